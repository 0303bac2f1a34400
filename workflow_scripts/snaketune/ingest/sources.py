"""Finds the input files and decompresses them. Detects the compression from a file's first bytes."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from snaketune.chat_files.line_reader import unreadable
from snaketune.common.cli import UserError

_LINES, _JSON, _PARQUET = (".jsonl", ".ndjson"), (".json",), (".parquet",)
_COMPRESSED = (".gz", ".zst", ".zstd")
KINDS = "*.json, *.jsonl or *.ndjson (each also with .gz or .zst) or *.parquet"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def find_inputs(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Returns the files to read: the given files, and files of a known kind in the given folders.

    Raises:
        UserError: A path does not exist, a file's kind is unknown, a folder has no input, or two files share a name.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = [
                Path(folder) / name
                for folder, _, names in os.walk(path, onerror=_cannot_list)
                for name in names
                if kind_of(name) and not name.startswith(".")
            ]
            if not below:
                raise UserError(f"{path} has no files to read", expected=KINDS, fix="correct --input")
            files += sorted(below)
        elif not path.exists():
            raise UserError(f"{path} does not exist", expected="a file or a folder", fix="correct --input")
        elif not kind_of(path.name):
            raise UserError(
                f"{path} is not a known kind of file",
                found=path.name,
                expected=KINDS,
                fix="rename or convert it",
            )
        else:
            files.append(path)
    files = list(dict.fromkeys(files))
    _refuse_same_names(files)
    return files


def kind_of(name: str) -> str | None:
    """Returns "lines", "json" or "parquet" for a file name, or None if the kind is unknown."""
    lower = name.lower()
    for suffix in _COMPRESSED:
        lower = lower.removesuffix(suffix)
    for kind, suffixes in (("lines", _LINES), ("json", _JSON), ("parquet", _PARQUET)):
        if lower.endswith(suffixes):
            return kind
    return None


def output_stem(path: Path) -> str:
    """Returns the name of a file without the suffixes of its kind."""
    name = path.name
    for suffixes in (_COMPRESSED, _LINES + _JSON + _PARQUET):
        for suffix in suffixes:
            if name.lower().endswith(suffix) and len(name) > len(suffix):
                name = name[: -len(suffix)]
                break
    return name


def decompressed(file: IO[bytes], path: Path) -> IO[bytes]:
    """Returns a stream of a binary file's decompressed content. Closing the stream closes the file."""
    start = file.read(4)
    file.seek(0)
    if start.startswith(_GZIP):
        return _Stream(gzip.GzipFile(fileobj=file), file)
    if start == _ZSTD:
        pyarrow = import_pyarrow(path)
        return _Stream(io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 20), file)
    return file


def import_pyarrow(path: Path):
    """Imports pyarrow, which only Zstandard and Parquet need."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} cannot be read without pyarrow",
            found="pyarrow is not installed",
            fix="pip install pyarrow",
        ) from None
    return pyarrow


class _Stream:
    """A decompressing stream. Raises OSError for bad compressed data."""

    def __init__(self, stream: IO[bytes], file: IO[bytes]):
        self._stream, self._file = stream, file

    def read(self, size: int) -> bytes:
        return self._call(self._stream.read, size)

    def readline(self, size: int) -> bytes:
        return self._call(self._stream.readline, size)

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def _call(function, size: int) -> bytes:
        try:
            return function(size)
        except EOFError:
            raise OSError(None, "the compressed data ends too early: the file was cut off") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise OSError(None, f"the compressed data is damaged: {error}") from None


def _cannot_list(error: OSError) -> None:
    raise unreadable(error.filename, error)


def _refuse_same_names(files: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        other = seen.setdefault(output_stem(file), file)
        if other != file:
            raise UserError(
                f"two input files would both become {output_stem(file)}.jsonl",
                found=f"{other} and {file}",
                fix="rename one, or ingest them into separate datasets",
            )
