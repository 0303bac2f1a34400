"""Writes `<file>.bin` and `<file>.bin.meta` as XTuner 0.2.0 does, block by block, whole or not at all.

A `.bin` line is `{"tokens": [...]}` with untrained ids negated. The meta file is `numpy.save` of int64 rows (byte
offset, token count). A copy of every 100th sample goes into the valid folder, and stays there if there are more than
500 of them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from common.files import atomic_path, sha256_file
from ftdp.block_tokenizer import TokenizedBlock

VALID_EVERY = 100
VALID_KEPT_ABOVE = 500
# numpy.save pads the header of a two-column int64 array to this, however many rows there are.
_HEADER_BYTES = 128


class Written(NamedTuple):
    """What stands in the train folder, and how many copies in the valid folder (0: too few, no file)."""

    samples: int
    bytes: int
    sha256: str
    meta_sha256: str
    valid_samples: int


class _TooFewCopies(Exception):
    """Ends the valid part, whose temporary files go away with it."""


def write_tokenized(train_path: Path, valid_path: Path, blocks: Iterable[TokenizedBlock]) -> Written:
    """Writes the train and the valid part of one JSONL file.

    All files are made beside their places and renamed at the end, the train `.bin` last; an exception leaves nothing.

    Args:
        train_path: The `.bin` in the train folder; its meta file is `<path>.meta`.
        valid_path: The same in the valid folder.
        blocks: The tokenised blocks, in order.
    """
    with _open_part(train_path) as train, suppress(_TooFewCopies), _open_part(valid_path) as valid:
        for block in blocks:
            _copy_every_100th(block, train.samples, valid)
            train.write(block.data, block.line_bytes, block.lengths)
        valid_samples = valid.samples
        if valid_samples <= VALID_KEPT_ABOVE:
            raise _TooFewCopies
    kept = valid_samples if valid_samples > VALID_KEPT_ABOVE else 0
    meta_sha256 = sha256_file(f"{train_path}.meta")
    return Written(train.samples, train.bytes, train.digest.hexdigest(), meta_sha256, kept)


class _Part:
    """One `.bin` and its meta file under their temporary names."""

    def __init__(self, bin_file: IO[bytes], meta_file: IO[bytes]):
        self._bin, self._meta = bin_file, meta_file
        self.samples = self.bytes = 0
        self.digest = hashlib.sha256()
        self._meta.write(bytes(_HEADER_BYTES))

    def write(self, data: bytes, line_bytes: np.ndarray, lengths: np.ndarray) -> None:
        self._bin.write(data)
        self.digest.update(data)
        ends = self.bytes + np.cumsum(line_bytes)
        self._meta.write(np.stack([ends - line_bytes, lengths], axis=1).astype("<i8").tobytes())
        self.samples += len(lengths)
        self.bytes += len(data)

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
        atomic_path(path) as bin_path,
        atomic_path(path.with_name(f"{path.name}.meta")) as meta_path,
        open(bin_path, "wb") as bin_file,
        open(meta_path, "wb") as meta_file,
    ):
        part = _Part(bin_file, meta_file)
        yield part
        part.finish()


def _copy_every_100th(block: TokenizedBlock, samples_before: int, valid: _Part) -> None:
    chosen = np.arange(len(block.lengths))
    chosen = chosen[(samples_before + chosen + 1) % VALID_EVERY == 0]
    if len(chosen):
        ends = np.cumsum(block.line_bytes)
        lines = [block.data[ends[index] - block.line_bytes[index] : ends[index]] for index in chosen]
        valid.write(b"".join(lines), block.line_bytes[chosen], block.lengths[chosen])


def _meta_header(rows: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": (rows, 2)})
    header = buffer.getvalue()
    assert len(header) == _HEADER_BYTES, len(header)
    return header
