"""Progress, speed and remaining time of a long job: a bar in a terminal, occasional lines in a log."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_BAR = 12


class Progress:
    """Counts finished work and prints progress.

    Args:
        unit: Unit that determines the remaining work; "bytes" are shown as MB.
        total: Total number of units.
        *others: Other units to count and show a rate for, once their count is above zero.
        stream: Output stream; standard error by default.
        every: Seconds between two lines if `stream` is not a terminal. Shorter jobs print nothing.
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
        """Adds finished work, and prints if the interval has passed.

        Args:
            label: The current work, shown in the line.
            **counts: Amounts by unit.
        """
        for unit, count in counts.items():
            self._counts[unit] += count
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            self._print(label, now)

    def finish(self) -> str:
        """Clears the terminal's line; returns the amounts, rates and elapsed time."""
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
            # A wrapped line could not be overwritten.
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
