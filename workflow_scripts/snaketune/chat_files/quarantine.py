"""Writes bad lines, unchanged and with the reason, as one JSON object per line: `{"file", "line", "reason", "raw"}`.

A line that is not UTF-8 has the key `raw_base64` instead of `raw`.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import IO

import orjson

from snaketune.common.cli import UserError
from snaketune.common.files import fsync_path, told_when_full


class QuarantineFile:
    """Writes a quarantine file line by line. Creates no file if no line is bad.

    The file appears when the context exits, even after an error, because its lines may explain the error.

    Attributes:
        path: Path of the file. Entering the context removes an existing file.
        count: Bad lines so far.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.count = 0
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file: IO[bytes] | None = None

    def __enter__(self) -> QuarantineFile:
        self.path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        try:
            with told_when_full(self.path):
                self._file.close()
                fsync_path(self._temporary)
                self._temporary.replace(self.path)
                fsync_path(self.path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)

    def add(self, record: bytes) -> None:
        """Writes a `quarantine_record`."""
        with told_when_full(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed by __exit__)
            self._file.write(record)
        self.count += 1


def quarantine_record(file: str, number: int, raw: bytes, reason: str) -> bytes:
    """Returns the line of a quarantine file for one bad line.

    Args:
        file: Name of the source.
        number: The line's number in the source, from 1.
        raw: The line, unchanged, without its line break.
        reason: Why the line is bad.
    """
    record = {"file": file, "line": number, "reason": reason}
    try:
        record["raw"] = raw.decode()
    except UnicodeDecodeError:
        record["raw_base64"] = base64.b64encode(raw).decode()
    # A reason may quote half a surrogate pair.
    record["reason"] = reason.encode("utf-8", "backslashreplace").decode()
    return orjson.dumps(record) + b"\n"


def refuse_too_many(file: str, bad: int, lines: int, max_share: float, quarantine: str) -> None:
    """Raises a UserError if too large a share of a file's lines is bad.

    Args:
        file: Name of the source.
        bad: Number of bad lines.
        lines: Number of lines.
        max_share: The largest allowed share.
        quarantine: Path of the bad lines, for the message.
    """
    if bad > max_share * lines:
        raise UserError(
            f"{file} has too many bad lines",
            found=f"{bad:,} of {lines:,} ({bad / lines:.1%}); see {quarantine} for the reasons",
            expected=f"at most {max_share:.1%}",
            fix="fix the lines, or allow a larger share (--max-bad-share; config: tokenize.max_bad_share)",
        )
