"""Reads the lines of a JSONL file that begin in a range of its bytes.

Ranges that tile a file give each of its lines once, whatever the ranges are: a line belongs to the range that its first
byte lies in.
"""

from __future__ import annotations

import os
from typing import IO

from snaketune.chat_files.line_reader import LineReader


class RangeReader(LineReader):
    """Iterates over the blocks of the lines that begin at `start` or later, and before `end`.

    The lines are numbered from 1, as if the file began at `start`; see `lines_before`.

    Attributes:
        sha256: Of the bytes of these lines, once the iteration is over.
        first_byte: Where the first of them begins.
    """

    def __init__(self, path: str | os.PathLike, start: int = 0, end: int | None = None):
        super().__init__(path)
        if end is None:
            end = os.fstat(self._file.fileno()).st_size
        if start:
            self._file.seek(start - 1)
            # Goes on to the next line, or nowhere where `start` begins one.
            self._file.readline()
        self.first_byte = self._file.tell() if start else 0
        # Only a file's very beginning may be a byte order mark; the base class knows it by the size read so far.
        self.size = self.first_byte
        self._file = _UpTo(self._file, end)

    @property
    def bytes_read(self) -> int:
        """Bytes of the lines read so far."""
        return self.size - self.first_byte


def lines_before(path: str | os.PathLike, start: int) -> int:
    """Returns the number of lines that begin before the byte `start`. Reads them all."""
    with RangeReader(path, 0, start) as reader:
        return sum(len(block.lines) for block in reader)


class _UpTo:
    """A file that seems to end at `end`; a line that begins before it is read in whole."""

    def __init__(self, file: IO[bytes], end: int):
        self._file, self._end = file, end
        self.fileno, self.close, self.readline = file.fileno, file.close, file.readline

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._end - self._file.tell())))
