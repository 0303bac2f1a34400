"""Ending a run before it is done, so that the next attempt goes on: signals, time limits, and the exit code for it."""

from __future__ import annotations

import os
import signal
import time

EXIT_GO_ON = 75  # EX_TEMPFAIL of sysexits.h: saved, start again to go on
STARTED = "SNAKETUNE_STARTED"  # environment: when the job began, in seconds since 1970
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Collects what wants this run to stop, and lets all ranks agree on the step after which it does.

    Args:
        time_limit: Minutes from the start of the job to the moment when it is killed; None or 0: no limit.

    Attributes:
        agreed: True on all ranks after the same step.
        save_seconds: What a save is expected to take; CheckpointHook keeps it at the longest one seen.
    """

    def __init__(self, time_limit: float | None = None):
        self.deadline = float("inf")
        if time_limit:
            started = float(os.environ.get(STARTED, time.time()))
            # A part of the limit for what follows the save: ending the processes, and clocks that differ.
            self.deadline = started + 60 * time_limit - min(60.0, 0.05 * 60 * time_limit)
        self.signal: int | None = None
        self.agreed = False
        self.save_seconds = 0.0
        self.longest_step = 0.0
        self._last_call: float | None = None

    def listen(self) -> None:
        """From now on SIGTERM, SIGUSR1 and SIGINT no longer end this process, but the run after its next step.

        A second SIGINT ends a process that was started alone at once; ranks leave that to their launcher.
        """
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame) -> None:
        if number == self.signal == signal.SIGINT and "SNAKETUNE_PARENT" not in os.environ:
            raise KeyboardInterrupt
        self.signal = number

    def agree(self, device) -> bool:
        """All ranks call it once a step; True when one of them was signalled or sees its time run out.

        Time runs out when another step as long as the longest one so far, saving and evaluation included, and a save
        after it may not fit any more.
        """
        import torch  # not above: the launcher and the ranks' first second do without
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
        """Remembers how long a save took."""
        self.save_seconds = max(self.save_seconds, seconds)
