"""Reads a JSONL file in blocks of whole lines. Memory does not grow with the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from snaketune.common.cli import UserError

# In the tokenizers library, the ids of a block and their strings take about 100 times its size.
BLOCK_BYTES = 384 << 10
# No file that is written line by line has longer lines. A line takes about five times its size in memory before it is
# rejected or set aside, so this bounds the memory.
MAX_LINE_BYTES = 256 << 20
_BOM = b"\xef\xbb\xbf"
# Inode, size in bytes, mtime in nanoseconds.
FileState = tuple[int, int, int]


class Block(NamedTuple):
    """Consecutive lines of a file, without line breaks.

    Attributes:
        first_line: Number of the first line, from 1.
        lines: The lines.
        size: Bytes that the lines take in the file.
        open_end: True if the last line has no line break, as in a truncated file.
    """

    first_line: int
    lines: list[bytes]
    size: int
    open_end: bool = False


class LineReader:
    r"""Iterates over a file's blocks. `\n`, `\r\n` and `\r` all end a line, as for Python's (and XTuner's) `open`.

    Skips a byte order mark at the start. `decode` takes the opened file and its path, and returns the stream to read,
    for example a decompressing one.

    Attributes:
        sha256: SHA-256 of all bytes, once the iteration is over.
        size: Size of the file in bytes, once the iteration is over.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        block_bytes: int = BLOCK_BYTES,
        *,
        decode: Callable[[IO[bytes], Path], IO[bytes]] | None = None,
    ):
        self.path = Path(path)
        self._block_bytes = block_bytes
        self._digest = hashlib.sha256()
        self.size = 0
        self._file, self._opened = open_source(self.path)
        if decode:
            self._file = decode(self._file, self.path)

    def __enter__(self) -> LineReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Block]:
        """Yields the blocks.

        Raises:
            UserError: The file cannot be read, or changed or was removed while it was read.
        """
        line_number = 1
        while data := self._read():
            self._digest.update(data)
            size = len(data)
            if self.size == 0 and data.startswith(_BOM):
                data = data[len(_BOM) :]
            self.size += size
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            lines = data.split(b"\n")
            open_end = bool(lines[-1])
            if not open_end:
                lines.pop()
            yield Block(line_number, lines, size, open_end)
            line_number += len(lines)
        refuse_changes(self.path, self._opened)

    def _read(self) -> bytes:
        try:
            data = self._file.read(self._block_bytes)
            if data and not data.endswith(b"\n"):
                rest = self._file.readline(MAX_LINE_BYTES)
                if len(rest) == MAX_LINE_BYTES:
                    first = self.size + data.rfind(b"\n") + 1
                    raise UserError(
                        f"{self.path} has a line of more than {MAX_LINE_BYTES >> 20} MiB",
                        found=f"it begins at byte {first:,}: {data[first - self.size :][:60]!r}...",
                        expected="a JSONL file: one conversation per line",
                        fix="write one conversation per line, or convert the file with ingest_dataset.py",
                    )
                data += rest
            return data
        except OSError as error:
            raise unreadable(self.path, error) from None

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def open_source(path: str | os.PathLike) -> tuple[IO[bytes], FileState]:
    """Opens a file for reading. Returns it with the state to pass to `refuse_changes` after reading.

    Raises:
        UserError: The file cannot be opened.
    """
    try:
        file = open(path, "rb", buffering=1 << 20)  # noqa: SIM115  (the caller closes it)
        return file, _state(os.fstat(file.fileno()))
    except OSError as error:
        raise unreadable(path, error) from None


def refuse_changes(path: str | os.PathLike, opened: FileState) -> None:
    """Raises a UserError if a file changed since it was opened: its manifest would be wrong."""
    try:
        now = _state(os.stat(path))
    except FileNotFoundError:
        found = "it was removed"
    except OSError as error:
        raise unreadable(path, error) from None
    else:
        if now == opened:
            return
        found = "size, mtime or inode changed"
    raise UserError(
        f"{path} was changed while it was read",
        found=found,
        expected="a file that does not change",
        fix="run again when nothing writes to it",
    )


def unreadable(path: str | os.PathLike, error: OSError) -> UserError:
    """Returns the UserError for a file that the system cannot read."""
    missing = isinstance(error, FileNotFoundError)
    fix = "restore it and run again" if missing else "check its permissions and the disk"
    found = error.strerror or error
    return UserError(f"{path} cannot be read", found=found, expected="a readable file", fix=fix)


def _state(stat: os.stat_result) -> FileState:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
