"""Plans the jobs of a tokenisation from file sizes alone. Imports nothing heavy: the workflow reads it too.

A large file is cut into byte ranges, one a job. All other files of all datasets are dealt to batches by a hash of
their names, so that an edited or a new file changes one batch and moves no file from one to another.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from snaketune.common.cli import UserError

# Bumped when the bytes that tokenisation writes for the same input change: then, and only then, code counts.
TOKENIZED_FORMAT = 1

MEGABYTE = 1_000_000
DEFAULT_SHARD_BYTES = 512 * MEGABYTE
DEFAULT_BATCH_BYTES = 64 * MEGABYTE
# Setting lines aside is little more than reading.
HELDOUT_BYTES = 4_000 * MEGABYTE


class Chunk(NamedTuple):
    """One JSONL file, or a range of it.

    Attributes:
        dataset: The dataset's name.
        source: The file.
        index: Which range, from 0.
        count: Ranges in all; 1 for a whole file.
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
        """Returns the byte range of a file of `size` bytes: the chunk holds the lines that begin in it."""
        return size * self.index // self.count, size * (self.index + 1) // self.count


def split_parts(
    datasets: Mapping[str, list[Path]],
    sizes: Mapping[Path, int],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    batch_bytes: int = DEFAULT_BATCH_BYTES,
) -> dict[str, list[Chunk]]:
    """Returns the chunks of each job by its name, which fits into a file name.

    Args:
        datasets: The JSONL files of each dataset, as `find_datasets` returns them.
        sizes: Bytes of each file.
        shard_bytes: A file of more is split into equal ranges of at most this.
        batch_bytes: Bytes that a batch is to hold. A file of more has a batch of its own.
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
    """Returns the names of the datasets of each job that takes whole ones; a job may have none."""
    batches = _batches(sum(sizes[file] for files in datasets.values() for file in files), batch_bytes)
    parts: dict[str, list[str]] = {f"batch-{n + 1:04d}-of-{batches:04d}": [] for n in range(batches)}
    for dataset in datasets:
        parts[_batch(dataset, batches)].append(dataset)
    return parts


def is_in_batch(name: str, batch: str) -> bool:
    """Is a dataset of this name the concern of this job of `split_datasets`?"""
    return _batch(name, int(batch.rpartition("-")[2])) == batch


def file_sizes(datasets: Mapping[str, list[Path]]) -> dict[Path, int]:
    """Returns the bytes of every file.

    Raises:
        UserError: A file is gone or cannot be looked at.
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
                    fix="put it back, or check its permissions",
                ) from None
    return sizes


def _batches(total: int, batch_bytes: int) -> int:
    # A power of two, so that a growing folder seldom changes the number.
    return 1 << max(0, (-(-total // batch_bytes) - 1).bit_length())


def _batch(name: str, batches: int) -> str:
    number = int.from_bytes(_digest(name)[:8], "big") % batches
    return f"batch-{number + 1:04d}-of-{batches:04d}"


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _readable_name(dataset: str, file: Path) -> str:
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{dataset}-{file.stem}")[:80]
    return f"{plain}-{_digest(f'{dataset}/{file.name}').hex()[:8]}"
