"""Reads the rows of an input file as JSON values, one at a time. Memory does not grow with the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from snaketune.chat_files.bad_lines import BadLine, parse_line
from snaketune.chat_files.line_reader import LineReader, open_source, refuse_changes, unreadable
from snaketune.common.cli import UserError
from snaketune.ingest.sources import decompressed, import_pyarrow, kind_of

# A longer JSON value is not a row.
MAX_ROW_CHARACTERS = 1 << 28
_CHUNK = 1 << 20
_PARQUET_ROWS = 256
_SPACE = " \t\n\r"
_NOT_SPACE = re.compile(f"[^{_SPACE}]")


class Row(NamedTuple):
    """One row.

    Attributes:
        number: The line in a JSONL file, the position in other files; from 1.
        raw: The unchanged row; for Parquet, the row as JSON.
        value: The JSON value, or the error if the row has none.
    """

    number: int
    raw: bytes
    value: Any | BadLine


class RowReader:
    """Iterates over the rows of a file.

    Attributes:
        position: Bytes of the file read so far, compressed bytes if it is compressed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.position = 0

    def __iter__(self) -> Iterator[Row]:
        """Yields the rows.

        Raises:
            UserError: The file cannot be read to its end. No setting skips the rest, because its rows are unknown.
        """
        kinds = {"lines": self._lines, "json": self._json, "parquet": self._parquet}
        return kinds[kind_of(self.path.name)]()

    def _lines(self) -> Iterator[Row]:
        with LineReader(self.path, decode=self._decompressed) as reader:
            for block in reader:
                last = block.first_line + len(block.lines) - 1
                self.position = self._raw.tell()
                for number, line in enumerate(block.lines, block.first_line):
                    try:
                        value = parse_line(line, block.open_end and number == last)
                    except BadLine as error:
                        value = error
                    yield Row(number, line, value)

    def _decompressed(self, file: IO[bytes], path: Path) -> IO[bytes]:
        self._raw = file
        return decompressed(file, path)

    def _json(self) -> Iterator[Row]:
        """Reads a list or consecutive values. Invalid UTF-8 becomes lone surrogates, which make the row bad."""
        file, state = open_source(self.path)
        with file:
            values = _JsonValues(decompressed(file, self.path), self.path)
            for number, (raw, value) in enumerate(values, 1):
                self.position = file.tell()
                yield Row(number, raw.encode("utf-8", "surrogateescape"), value)
        refuse_changes(self.path, state)

    def _parquet(self) -> Iterator[Row]:
        """Reads one row group at a time, because a reader of several groups keeps all of them in memory.

        A struct column has every key in every row, with null for missing values. Nulls are dropped.
        """
        pyarrow = import_pyarrow(self.path)
        file, state = open_source(self.path)
        number = 0
        with file:
            try:
                table = pyarrow.parquet.ParquetFile(file)
                total = max(1, table.metadata.num_rows)
                groups = range(table.metadata.num_row_groups)
                for batch in chain.from_iterable(
                    table.iter_batches(_PARQUET_ROWS, row_groups=[group]) for group in groups
                ):
                    self.position = state[1] * number // total
                    for value in batch.to_pylist():
                        number += 1
                        value = _without_nulls(value)
                        raw = json.dumps(value, ensure_ascii=False, default=str)
                        yield Row(number, raw.encode("utf-8", "backslashreplace"), value)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(
                    f"{self.path} is not a complete Parquet file", found=error, fix="copy it again"
                ) from None
        refuse_changes(self.path, state)


class _JsonValues:
    """Iterates over (text, value) of a list's elements, or of consecutive values."""

    def __init__(self, stream: IO[bytes], path: Path):
        self._stream, self._path = stream, path
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended, self._before = "", 0, False, 0

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self._more()
        self._text = self._text.removeprefix("\ufeff")
        as_list = self._next_character() == "["
        if as_list:
            self._at += 1
        first = True
        while True:
            character = self._next_character()
            if as_list and not first and character == ",":
                self._at += 1
            elif as_list and not first and character and character != "]":
                raise self._broken("no comma between two elements of the list")
            if as_list and character == "]":
                self._at += 1
                if self._next_character():
                    raise self._broken("text after the end of the list")
                return
            if not character:
                if as_list:
                    raise self._broken("the list has no end: the file was cut off")
                return
            yield self._value()
            first = False

    def _value(self) -> tuple[str, Any]:
        if not self._next_character():
            raise self._broken("the list has no end: the file was cut off")
        size = _CHUNK
        while True:
            try:
                value, end = self._scan(self._text, self._at)
                # A number may continue in the unread data.
                if end < len(self._text) or self._ended:
                    break
            except RecursionError:
                raise self._broken("values nested too deeply") from None
            except ValueError as error:
                # Near the end, more data may fix the error; elsewhere it is a real error.
                near_the_end = error.pos >= len(self._text.rstrip(_SPACE)) - 12
                if self._ended or not (near_the_end or error.msg.startswith("Unterminated string")):
                    self._at = error.pos
                    raise self._broken(error.msg) from None
            if len(self._text) - self._at > MAX_ROW_CHARACTERS:
                raise self._broken(f"a value of more than {MAX_ROW_CHARACTERS >> 20} million characters")
            # Double the size each time, so that a long value is rescanned only a few times.
            self._more(size)
            size *= 2
        raw, self._at = self._text[self._at : end], end
        return raw, value

    def _next_character(self) -> str:
        """Peeks at the next character that is not a space; "" at the end."""
        while True:
            match = _NOT_SPACE.search(self._text, self._at)
            if match:
                self._at = match.start()
                return match[0]
            self._at = len(self._text)
            if self._ended:
                return ""
            self._more()

    def _more(self, size: int = _CHUNK) -> None:
        try:
            data = self._stream.read(size)
        except OSError as error:
            raise unreadable(self._path, error) from None
        self._ended = not data
        self._before += self._at
        self._text = self._text[self._at :] + self._utf8.decode(data, final=self._ended)
        self._at = 0

    def _broken(self, found: str) -> UserError:
        place = self._before + self._at
        return UserError(
            f"{self._path}: not JSON at character {place:,}",
            found=f"{found}, at {self._text[self._at : self._at + 60]!r}",
            expected="a list of rows, or consecutive rows",
            fix="fix the file (in a JSONL file, a broken row does not affect the others)",
        )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
