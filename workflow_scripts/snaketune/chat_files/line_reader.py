"""Reads a JSONL file in blocks of whole lines, so that memory does not grow with the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from snaketune.common.cli import UserError

# A block's ids and their strings take about 100 times its bytes in the tokenizers library.
BLOCK_BYTES = 384 << 10
# Nothing that is written line by line has such lines. A line takes about five times its bytes on its way to where it is
# refused or set aside, so this bounds the memory.
MAX_LINE_BYTES = 256 << 20
_BOM = b"\xef\xbb\xbf"
# Inode, bytes, time of the last change in nanoseconds.
FileState = tuple[int, int, int]


class Block(NamedTuple):
    """Consecutive lines of a file, without line breaks.

    Attributes:
        first_line: Number of the first one, from 1.
        lines: The lines.
        size: Bytes of the file that they stand for.
        open_end: The last line has no line break, as in a file that was cut off.
    """

    first_line: int
    lines: list[bytes]
    size: int
    open_end: bool = False


class LineReader:
    r"""Iterates over a file's blocks. `\n`, `\r\n` and `\r` all end a line, as for Python's (and XTuner's) `open`.

    A byte order mark at the start is passed over. `decode` makes the stream that is read of the opened file and its
    path, for example a decompressing one.

    Attributes:
        sha256: Of all bytes, once the iteration is over.
        size: Bytes of the file, once the iteration is over.
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
            UserError: The file cannot be read, or was changed or removed meanwhile.
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
                        expected="a JSONL file: one conversation on each line",
                        fix="write it line by line, or let ingest_dataset.py convert it",
                    )
                data += rest
            return data
        except OSError as error:
            raise unreadable(self.path, error) from None

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def open_source(path: str | os.PathLike) -> tuple[IO[bytes], FileState]:
    """Opens a file to read it, and returns it with the state to hand to `refuse_changes` when it is read.

    Raises:
        UserError: The file cannot be opened.
    """
    try:
        file = open(path, "rb", buffering=1 << 20)  # noqa: SIM115  (the caller closes it)
        return file, _state(os.fstat(file.fileno()))
    except OSError as error:
        raise unreadable(path, error) from None


def refuse_changes(path: str | os.PathLike, opened: FileState) -> None:
    """Raises a UserError if a file is not the one that was opened: a manifest would describe what never was."""
    try:
        now = _state(os.stat(path))
    except FileNotFoundError:
        found = "it was removed"
    except OSError as error:
        raise unreadable(path, error) from None
    else:
        if now == opened:
            return
        found = "its size, time stamp or inode is another"
    raise UserError(
        f"{path} was changed while it was read",
        found=found,
        expected="a file that stays as it is",
        fix="run again when nothing writes to it any more",
    )


def unreadable(path: str | os.PathLike, error: OSError) -> UserError:
    """Returns the error to raise for a file that the system does not let us read."""
    missing = isinstance(error, FileNotFoundError)
    fix = "put it back, and run again" if missing else "check its permissions and the disk"
    found = error.strerror or error
    return UserError(f"{path} cannot be read", found=found, expected="a readable file", fix=fix)


def _state(stat: os.stat_result) -> FileState:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
