"""Writes `<file>.bin` and `<file>.bin.meta` as XTuner 0.2.0 does, block by block, whole or not at all.

A `.bin` line is `{"tokens": [...]}` with untrained ids negated. The meta file is `numpy.save` of int64 rows (byte
offset, token count). A copy of every 100th sample goes into the valid folder, and stays there if there are more than
500 of them; or, with `valid: holdout`, the samples chosen for it go there and nowhere else.
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
# numpy.save pads the header of a two-column int64 array to this, however many rows there are.
_HEADER_BYTES = 128
_READ_BYTES = 4 << 20


class Lines(NamedTuple):
    """Consecutive lines of a `.bin` file.

    Attributes:
        data: The lines, joined.
        line_bytes: int64 array (samples,), bytes of each line.
        lengths: int64 array (samples,), tokens of each line.
    """

    data: bytes
    line_bytes: np.ndarray
    lengths: np.ndarray

    def chosen(self, which: np.ndarray) -> Lines:
        """Returns the lines of a bool array (samples,)."""
        ends = np.cumsum(self.line_bytes)
        lines = [
            self.data[ends[index] - self.line_bytes[index] : ends[index]] for index in np.flatnonzero(which)
        ]
        return Lines(b"".join(lines), self.line_bytes[which], self.lengths[which])


class Written(NamedTuple):
    """What stands in the train folder, and how many samples in the valid folder (0: no file)."""

    samples: int
    bytes: int
    sha256: str
    meta_sha256: str
    valid_samples: int


class _NotKept(Exception):
    """Ends a part, whose temporary files go away with it."""


def write_tokenized(
    train_path: Path, valid_path: Path, blocks: Iterable[tuple[Lines, Lines | None]], copy: bool
) -> Written:
    """Writes the train and the valid part of one JSONL file.

    All files are made beside their places and renamed at the end, the train `.bin` last; an exception leaves nothing.

    Args:
        train_path: The `.bin` in the train folder; its meta file is `<path>.meta`.
        valid_path: The same in the valid folder.
        blocks: The lines for the train part and those that only the valid part gets, in order.
        copy: Copy every 100th train line into the valid part.
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
    """Yields the lines of a `.bin` file, some megabytes at a time."""
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
    """One `.bin` and its meta file under their temporary names."""

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
        """Puts the header, which holds the number of rows, in front of the rows."""
        self._meta.seek(0)
        if self.samples:
            self._meta.write(_meta_header(self.samples))
        else:
            np.save(self._meta, [])  # XTuner's call for a file without a conversation: an array of floats
            self._meta.truncate()


@contextmanager
def _open_part(path: Path) -> Iterator[_Part]:
    # Left in reverse order, so both are closed before the renames, and the .bin gets its name after its meta file.
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
