"""Stops a run early so that the next attempt can resume it: signals, time limits, and the exit code."""

from __future__ import annotations

import os
import signal
import time

EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: saved; start again to resume
STARTED = "SNAKETUNE_STARTED"  # environment: when the job began, in seconds since 1970
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Collects the reasons to stop this run, and lets all ranks agree on the step after which to stop.

    Args:
        time_limit: Minutes from the start of the job until it is killed; None or 0 means no limit.

    Attributes:
        agreed: True on all ranks after the same step.
        save_seconds: Expected duration of a save: the longest so far, maintained by CheckpointHook.
    """

    def __init__(self, time_limit: float | None = None):
        self.deadline = float("inf")
        if time_limit:
            started = float(os.environ.get(STARTED, time.time()))
            # Reserve part of the limit for ending the processes after the save, and for clock skew.
            self.deadline = started + 60 * time_limit - min(60.0, 0.05 * 60 * time_limit)
        self.signal: int | None = None
        self.agreed = False
        self.save_seconds = 0.0
        self.longest_step = 0.0
        self._last_call: float | None = None

    def listen(self) -> None:
        """Makes SIGTERM, SIGUSR1 and SIGINT stop the run after the current step.

        Without this, they would kill the process. A second SIGINT ends a process without a launcher at once. Ranks leave that to their launcher.
        """
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame) -> None:
        if number == self.signal == signal.SIGINT and "SNAKETUNE_PARENT" not in os.environ:
            raise KeyboardInterrupt
        self.signal = number

    def agree(self, device) -> bool:
        """Returns True if any rank received a signal or is running out of time.

        All ranks call it once per step. Time is running out if one more step and a save may not fit. The step is assumed to take as long as
        the longest so far, including its save and evaluation.
        """
        import torch  # imported late: the launcher does not need it
        from torch import distributed

        now = time.monotonic()
        if self._last_call is not None:
            self.longest_step = max(self.longest_step, now - self._last_call)
        self._last_call = now
        late = time.time() + self.longest_step + 1.5 * self.save_seconds > self.deadline
        wishes = torch.tensor([self.signal or 0, int(late)], device=device)
        distributed.all_reduce(wishes, op=distributed.ReduceOp.MAX)
        number, late = wishes.tolist()
        self.agreed = bool(number or late)
        self.reason = signal.Signals(number).name if number else "the time limit is near"
        return self.agreed

    def saved(self, seconds: float) -> None:
        """Records how long a save took."""
        self.save_seconds = max(self.save_seconds, seconds)
