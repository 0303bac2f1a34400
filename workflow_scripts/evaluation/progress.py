"""Progress with rate and time left: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Counts work done.

    Args:
        total: Units of work in all.
        what: What is done, for the start of the line.
        unit: Name of a unit.
        every: Seconds between two lines in a log.
    """

    def __init__(self, total: int, what: str, unit: str, every: float = 15.0):
        self._total, self._what, self._unit, self._every = total, what, unit, every
        self._done, self._start = 0, time.monotonic()
        self._printed = self._start
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}") if sys.stderr.isatty() else None

    def add(self, count: int) -> None:
        """Reports `count` more units as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            if self._done >= self._total:
                self._bar.close()
            return
        now = time.monotonic()
        if self._done >= self._total or now - self._printed >= self._every:
            self._printed = now
            rate = self._done / max(now - self._start, 1e-9)
            left = (self._total - self._done) / max(rate, 1e-9)
            print(
                f"{self._what}: {self._done}/{self._total} {self._unit}, {rate:.3g} {self._unit}/s, {left:.0f} s left",
                flush=True,
            )
