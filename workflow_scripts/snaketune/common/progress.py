"""How far a long job is, how fast, and how long it still takes: a bar in a terminal, now and then a line in a log."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_BAR = 12


class Progress:
    """Counts what is done and prints it.

    Args:
        unit: What is counted to know how much is left; "bytes" are shown as MB.
        total: How many there are.
        *others: What else is counted, for its rate; shown once there is some of it.
        stream: Where to print; standard error by default.
        every: Seconds between two lines where `stream` is no terminal. What takes less prints nothing.
    """

    def __init__(
        self, unit: str, total: int, *others: str, stream: TextIO | None = None, every: float = 30.0
    ):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.2 if self._terminal else every
        self._unit, self._total = unit, total
        self._counts = dict.fromkeys((*others, unit), 0)
        self._start = self._last = time.monotonic()

    def add(self, label: str, **counts: int) -> None:
        """Adds what was done and prints, if it is time to.

        Args:
            label: What is being done, for the start of the line.
            **counts: How much, by unit.
        """
        for unit, count in counts.items():
            self._counts[unit] += count
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            self._print(label, now)

    def finish(self) -> str:
        """Clears the terminal's line and returns what was done, how fast and in which time."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        now = time.monotonic()
        return f"{', '.join(self._amounts(now))} in {_clock(now - self._start)}"

    def _print(self, label: str, now: float) -> None:
        done = self._counts[self._unit]
        share = min(1.0, done / self._total) if self._total else 1.0
        left = (now - self._start) * (self._total - done) / done if done else None
        ends = [f"{_clock(max(0.0, left))} left"] if left is not None else []
        if not self._terminal:
            self._stream.write(f"{label}: {', '.join([f'{share:.0%}', *self._amounts(now), *ends])}\n")
        else:
            filled = round(_BAR * share)
            bar = f"{share:4.0%} [{'#' * filled}{'.' * (_BAR - filled)}]"
            text = f"{bar} {', '.join([*ends, *self._rates(now), label])}"
            # A line that the terminal breaks could not be written over.
            self._stream.write(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K")
        self._stream.flush()

    def _amounts(self, now: float) -> list[str]:
        counted = [unit for unit in self._counts if unit != "bytes" and self._counts[unit]]
        amounts = [
            f"{self._counts[unit]:,} {unit} ({_rate(self._counts[unit], now - self._start)}/s)"
            for unit in counted
        ]
        return amounts + self._rates(now)[len(counted) :]

    def _rates(self, now: float) -> list[str]:
        seconds = now - self._start
        return [
            f"{_rate(count / 1e6, seconds)} MB/s" if unit == "bytes" else f"{_rate(count, seconds)} {unit}/s"
            for unit, count in self._counts.items()
            if count
        ]


def _rate(count: float, seconds: float) -> str:
    rate = count / max(seconds, 1e-6)
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
