"""Splits a tokenisation into jobs by file size alone. Imports nothing heavy: the workflow uses it too.

A large file is cut into byte ranges, one per job. All other files of all datasets are assigned to batches by
a hash of their names, so an edited or new file changes only one batch and moves no other file between
batches.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from snaketune.common.cli import UserError
from snaketune.settings.schema import default_of

# Increase if and only if the same input gives different bytes. Otherwise, code changes never cause tokenising again.
TOKENIZED_FORMAT = 1

MEGABYTE = 1_000_000
DEFAULT_SHARD_BYTES = default_of("tokenize.shard_mb") * MEGABYTE
DEFAULT_BATCH_BYTES = default_of("tokenize.batch_mb") * MEGABYTE
# Setting aside lines takes little more time than reading them.
HELDOUT_BYTES = 4_000 * MEGABYTE


class Chunk(NamedTuple):
    """One JSONL file, or a byte range of it.

    Attributes:
        dataset: The dataset's name.
        source: The file.
        index: Index of the range, from 0.
        count: Number of ranges; 1 for a whole file.
    """

    dataset: str
    source: Path
    index: int = 0
    count: int = 1

    @property
    def whole(self) -> Chunk:
        """The whole file."""
        return Chunk(self.dataset, self.source)

    def range(self, size: int) -> tuple[int, int]:
        """Returns the byte range in a file of `size` bytes. The chunk has the lines that begin in it."""
        return size * self.index // self.count, size * (self.index + 1) // self.count


def split_parts(
    datasets: Mapping[str, list[Path]],
    sizes: Mapping[Path, int],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    batch_bytes: int = DEFAULT_BATCH_BYTES,
) -> dict[str, list[Chunk]]:
    """Returns the chunks of each job by the job's name, which is valid in a file name.

    Args:
        datasets: The JSONL files of each dataset, as returned by `find_datasets`.
        sizes: Bytes of each file.
        shard_bytes: Larger files are split into equal ranges of at most this size.
        batch_bytes: Target size of a batch. Larger files get a separate job.
    """
    parts: dict[str, list[Chunk]] = {}
    small: list[tuple[str, Path]] = []
    for dataset, files in datasets.items():
        for file in files:
            size = sizes[file]
            if size <= min(shard_bytes, batch_bytes):
                small.append((dataset, file))
                continue
            count = -(-size // shard_bytes)
            name = _readable_name(dataset, file)
            for index in range(count):
                part = f"{name}.{index + 1:04d}-of-{count:04d}" if count > 1 else name
                parts[part] = [Chunk(dataset, file, index, count)]
    batches = _batches(sum(sizes[file] for _, file in small), batch_bytes)
    for dataset, file in small:
        parts.setdefault(_batch(f"{dataset}/{file.name}", batches), []).append(Chunk(dataset, file))
    return dict(sorted(parts.items()))


def split_datasets(
    datasets: Mapping[str, list[Path]], sizes: Mapping[Path, int], batch_bytes: int = HELDOUT_BYTES
) -> dict[str, list[str]]:
    """Returns the dataset names of each job, for jobs that process whole datasets. A job may have none."""
    batches = _batches(sum(sizes[file] for files in datasets.values() for file in files), batch_bytes)
    parts: dict[str, list[str]] = {f"batch-{n + 1:04d}-of-{batches:04d}": [] for n in range(batches)}
    for dataset in datasets:
        parts[_batch(dataset, batches)].append(dataset)
    return parts


def is_in_batch(name: str, batch: str) -> bool:
    """True if this job of `split_datasets` processes the dataset of this name."""
    return _batch(name, int(batch.rpartition("-")[2])) == batch


def file_sizes(datasets: Mapping[str, list[Path]]) -> dict[Path, int]:
    """Returns the bytes of every file.

    Raises:
        UserError: A file is missing or inaccessible.
    """
    sizes = {}
    for files in datasets.values():
        for file in files:
            try:
                sizes[file] = os.stat(file).st_size
            except OSError as error:
                raise UserError(
                    f"{file} cannot be read",
                    found=error.strerror,
                    fix="restore the file, or check its permissions",
                ) from None
    return sizes


def _batches(total: int, batch_bytes: int) -> int:
    # A power of two, so that the number rarely changes as the data grow.
    return 1 << max(0, (-(-total // batch_bytes) - 1).bit_length())


def _batch(name: str, batches: int) -> str:
    number = int.from_bytes(_digest(name)[:8], "big") % batches
    return f"batch-{number + 1:04d}-of-{batches:04d}"


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _readable_name(dataset: str, file: Path) -> str:
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{dataset}-{file.stem}")[:80]
    return f"{plain}-{_digest(f'{dataset}/{file.name}').hex()[:8]}"
