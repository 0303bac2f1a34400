"""Reads the lines of a JSONL file that begin in a byte range.

A line belongs to the range of its first byte, so any ranges that tile a file give each line exactly once.
"""

from __future__ import annotations

import os
from typing import IO

from snaketune.chat_files.line_reader import LineReader


class RangeReader(LineReader):
    """Iterates over the blocks of the lines that begin at byte `start` or later, and before byte `end`.

    Lines are numbered from 1, as if the file began at `start`; see `lines_before`.

    Attributes:
        sha256: SHA-256 of the bytes of these lines, once the iteration is over.
        first_byte: Offset of the first line.
    """

    def __init__(self, path: str | os.PathLike, start: int = 0, end: int | None = None):
        super().__init__(path)
        if end is None:
            end = os.fstat(self._file.fileno()).st_size
        if start:
            self._file.seek(start - 1)
            # Skip to the next line, unless a line begins at `start`.
            self._file.readline()
        self.first_byte = self._file.tell() if start else 0
        # A byte order mark is only allowed at offset 0; the base class checks the size read so far.
        self.size = self.first_byte
        self._file = _UpTo(self._file, end)

    @property
    def bytes_read(self) -> int:
        """Bytes of the lines read so far."""
        return self.size - self.first_byte


def lines_before(path: str | os.PathLike, start: int) -> int:
    """Returns the number of lines that begin before byte `start`. Reads all of them."""
    with RangeReader(path, 0, start) as reader:
        return sum(len(block.lines) for block in reader)


class _UpTo:
    """Makes a file appear to end at byte `end`; a line that begins before `end` is still read completely."""

    def __init__(self, file: IO[bytes], end: int):
        self._file, self._end = file, end
        self.fileno, self.close, self.readline = file.fileno, file.close, file.readline

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._end - self._file.tell())))
