"""Reads a JSONL file in blocks of whole lines, so that memory does not grow with the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from common.cli import UserError

# A block's ids and their strings take about 100 times its bytes in the tokenizers library.
BLOCK_BYTES = 384 << 10
_BOM = b"\xef\xbb\xbf"


class Block(NamedTuple):
    """Consecutive lines of a file, without line breaks.

    Attributes:
        first_line: Number of the first one, from 1.
        lines: The lines.
        size: Bytes of the file that they stand for.
    """

    first_line: int
    lines: list[bytes]
    size: int


class LineReader:
    r"""Iterates over a file's blocks. `\n`, `\r\n` and `\r` all end a line, as for Python's (and XTuner's) `open`.

    A byte order mark at the start is passed over.

    Attributes:
        sha256: Of all bytes, once the iteration is over.
        size: Bytes of the file, once the iteration is over.
    """

    def __init__(self, path: str | os.PathLike, block_bytes: int = BLOCK_BYTES):
        self.path = Path(path)
        self._block_bytes = block_bytes
        self._digest = hashlib.sha256()
        self.size = 0
        try:
            self._file = open(self.path, "rb", buffering=1 << 20)  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read", found=error.strerror, fix="check its permissions"
            ) from None

    def __enter__(self) -> LineReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Block]:
        line_number = 1
        while data := self._file.read(self._block_bytes):
            if not data.endswith(b"\n"):
                data += self._file.readline()
            self._digest.update(data)
            size = len(data)
            if self.size == 0 and data.startswith(_BOM):
                data = data[len(_BOM) :]
            self.size += size
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            lines = data.split(b"\n")
            if not lines[-1]:
                lines.pop()
            yield Block(line_number, lines, size)
            line_number += len(lines)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def parse_line(line: bytes, where: str) -> Any:
    """Returns the JSON value of a line.

    Args:
        line: Its bytes.
        where: `file:line`, for the message.

    Raises:
        UserError: The line is blank, not UTF-8 or not JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    # The standard library takes some things that orjson does not (NaN, half a surrogate pair); it decides.
    if not line.strip():
        raise UserError(
            f"{where}: blank line",
            found="a line without text",
            expected="one JSON list of messages on every line",
            fix="remove the line, at the end of the file too",
        )
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        found, fix = f"{error.reason} at byte {error.start} of the line", "save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        found = f"{error}" if isinstance(error, ValueError) else "values nested too deeply"
        fix = "correct the line; each conversation stands on a line of its own"
    raise UserError(
        f"{where}: not JSON", found=f"{found}, in {line[:60]!r}", expected="a JSON list of messages", fix=fix
    )
