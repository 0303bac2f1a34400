"""Says how far a long tokenisation is: a line that rewrites itself in a terminal, now and then a line in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class TokenizeProgress:
    """Counts what is done and prints samples/s, tokens/s, MB/s and the time that is left.

    Args:
        total_bytes: Bytes of all JSONL files.
        stream: Where to print; standard error by default.
        interval: Seconds between two lines where `stream` is no terminal.
    """

    def __init__(self, total_bytes: int, stream: TextIO | None = None, interval: float = 10.0):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.2 if self._terminal else interval
        self._total = total_bytes
        self._start = self._last = time.monotonic()
        self.bytes = self.samples = self.tokens = 0

    def update(self, label: str, size: int, samples: int, tokens: int) -> None:
        """Adds a block of `size` source bytes and prints, if it is time to."""
        self.bytes += size
        self.samples += samples
        self.tokens += tokens
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            self._print(f"{label}: {self._status(now)}")

    def finish(self) -> str:
        """Clears the terminal's line and returns the final status."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
        return self._status(time.monotonic())

    def _status(self, now: float) -> str:
        seconds = max(now - self._start, 1e-6)
        # Ingest reads no tokens.
        tokens = f"{self.tokens:,} tokens ({self.tokens / seconds:,.0f}/s), " if self.tokens else ""
        status = (
            f"{self.samples:,} samples ({self.samples / seconds:,.0f}/s), "
            f"{tokens}{self.bytes / 1e6 / seconds:.1f} MB/s"
        )
        if self.bytes < self._total:
            left = (self._total - self.bytes) * seconds / max(self.bytes, 1)
            status = f"{100 * self.bytes / self._total:.0f}% {status}, {_clock(left)} left"
        return f"{status}, {_clock(seconds)} so far"

    def _print(self, text: str) -> None:
        if self._terminal:
            self._stream.write(f"\r{text}\x1b[K")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
