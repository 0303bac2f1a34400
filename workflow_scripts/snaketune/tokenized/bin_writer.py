"""Writes `<file>.bin` and `<file>.bin.meta` in XTuner 0.2.0's format, block by block and atomically.

A `.bin` line is `{"tokens": [...]}` with untrained ids negated. The meta file is `numpy.save` of int64 rows (byte
offset, token count). With `valid: copy`, every 100th document is copied to the valid folder; the copies are
kept only if there are more than 500. With `valid: holdout`, the chosen documents go to the valid folder only.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from snaketune.common.files import atomic_path, sha256_file
from snaketune.tokenized.layout import meta_path

VALID_EVERY = 100
VALID_KEPT_ABOVE = 500
# numpy.save pads the header of a two-column int64 array to this size, whatever the number of rows.
_HEADER_BYTES = 128
_READ_BYTES = 4 << 20


class Lines(NamedTuple):
    """Consecutive lines of a `.bin` file.

    Attributes:
        data: The joined lines.
        line_bytes: int64 array (documents,), bytes of each line.
        lengths: int64 array (documents,), tokens of each line.
    """

    data: bytes
    line_bytes: np.ndarray
    lengths: np.ndarray

    def chosen(self, which: np.ndarray) -> Lines:
        """Returns the lines that a bool array (documents,) selects."""
        ends = np.cumsum(self.line_bytes)
        lines = [
            self.data[ends[index] - self.line_bytes[index] : ends[index]] for index in np.flatnonzero(which)
        ]
        return Lines(b"".join(lines), self.line_bytes[which], self.lengths[which])


class Written(NamedTuple):
    """Size and digests of the train files, and the number of documents in the valid folder (0: no file)."""

    samples: int
    bytes: int
    sha256: str
    meta_sha256: str
    valid_samples: int


class _NotKept(Exception):
    """Discards the valid part, which removes its temporary files."""


def write_tokenized(
    train_path: Path, valid_path: Path, blocks: Iterable[tuple[Lines, Lines | None]], copy: bool
) -> Written:
    """Writes the train and valid files of one JSONL file.

    Writes temporary files beside the targets and renames them at the end, the train `.bin` last. An exception
    leaves nothing behind.

    Args:
        train_path: The `.bin` in the train folder; its meta file is `<path>.meta`.
        valid_path: The `.bin` in the valid folder.
        blocks: Pairs of lines for the train file and lines for the valid file only, in order.
        copy: Copy every 100th train line to the valid file.
    """
    with _open_part(train_path) as train, suppress(_NotKept), _open_part(valid_path) as valid:
        for lines, moved in blocks:
            if copy:
                numbers = train.samples + np.arange(len(lines.lengths)) + 1
                valid.write(lines.chosen(numbers % VALID_EVERY == 0))
            if moved is not None:
                valid.write(moved)
            train.write(lines)
        valid_samples = valid.samples
        if valid_samples <= (VALID_KEPT_ABOVE if copy else 0):
            valid_samples = 0
            raise _NotKept
    meta_sha256 = sha256_file(meta_path(train_path))
    return Written(train.samples, train.bytes, train.digest.hexdigest(), meta_sha256, valid_samples)


def read_tokenized(path: Path) -> Iterator[Lines]:
    """Yields the lines of a `.bin` file, a few megabytes at a time."""
    rows = np.load(meta_path(path), mmap_mode="r")
    with open(path, "rb") as file:
        first = 0
        starts = np.append(rows[:, 0], path.stat().st_size) if len(rows) else np.zeros(1, dtype=np.int64)
        while first < len(rows):
            last = max(int(np.searchsorted(starts, starts[first] + _READ_BYTES)), first + 1)
            last = min(last, len(rows))
            data = file.read(int(starts[last] - starts[first]))
            yield Lines(data, np.diff(starts[first : last + 1]), np.array(rows[first:last, 1]))
            first = last


class _Part:
    """One `.bin` and its meta file, under temporary names."""

    def __init__(self, bin_file: IO[bytes], meta_file: IO[bytes]):
        self._bin, self._meta = bin_file, meta_file
        self.samples = self.bytes = 0
        self.digest = hashlib.sha256()
        self._meta.write(bytes(_HEADER_BYTES))

    def write(self, lines: Lines) -> None:
        self._bin.write(lines.data)
        self.digest.update(lines.data)
        ends = self.bytes + np.cumsum(lines.line_bytes)
        self._meta.write(np.stack([ends - lines.line_bytes, lines.lengths], axis=1).astype("<i8").tobytes())
        self.samples += len(lines.lengths)
        self.bytes += len(lines.data)

    def finish(self) -> None:
        """Writes the meta file's header, which holds the number of rows."""
        self._meta.seek(0)
        if self.samples:
            self._meta.write(_meta_header(self.samples))
        else:
            np.save(self._meta, [])  # XTuner's call for a file without documents: an array of floats
            self._meta.truncate()


@contextmanager
def _open_part(path: Path) -> Iterator[_Part]:
    # Exits in reverse order: closes both files, then renames the meta file, then the .bin.
    with (
        atomic_path(path) as bin_temporary,
        atomic_path(meta_path(path)) as meta_temporary,
        open(bin_temporary, "wb") as bin_file,
        open(meta_temporary, "wb") as meta_file,
    ):
        part = _Part(bin_file, meta_file)
        yield part
        part.finish()


def _meta_header(rows: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": (rows, 2)})
    header = buffer.getvalue()
    assert len(header) == _HEADER_BYTES, len(header)
    return header
