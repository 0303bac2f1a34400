"""Packed rows as torch data: the dataset, the order a rank sees it in, and one row as tensors."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ftdp.packing import load_packed_files, sampler_indices


class PackedDataset(Dataset):
    """All packed rows of a train folder, numbered file after file in the data order.

    Args:
        folder: `.../chatml_llamav13_32k/train`.
        packed_length: Tokens of a row.
        data_order_path: A `data_order.txt`; None walks the folder.
        seed: Seed of the shuffle within each file; XTuner's is 1024.
        min_length: Conversations with fewer tokens are left out.

    Raises:
        UserError: A file is missing or broken, or no file fills a row.
    """

    def __init__(
        self,
        folder: str,
        packed_length: int,
        data_order_path: str | None = None,
        seed: int = 1024,
        min_length: int = 0,
    ):
        self.files = load_packed_files(
            folder, data_order_path, packed_length, seed=seed, min_length=min_length
        )
        self._ends = list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """Returns `input_ids`, `labels`, `position_ids` (packed_length,) and `cumulative_len` (documents + 1,)."""
        file = bisect.bisect_right(self._ends, row)
        return self.files[file][row - (self._ends[file - 1] if file else 0)]


class PackedSampler(Sampler):
    """The rows of this rank in XTuner's `InternRepoSampler` order; starts anywhere in an epoch at no cost.

    Args:
        dataset: Anything with a length.
        shuffle: False deals the rows in their own order.
        seed: XTuner's is 1024.
        rank: Of this process; None asks torch.distributed. `world_size` likewise.
    """

    def __init__(
        self,
        dataset: Dataset,
        shuffle: bool = True,
        seed: int = 1024,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if running else 0
        self.world_size = world_size or (torch.distributed.get_world_size() if running else 1)
        self.rows, self.shuffle, self.seed = len(dataset), shuffle, seed
        self.epoch = self.start = 0

    def seek(self, epoch: int, start: int = 0) -> None:
        """Makes the next iteration yield `epoch` from its `start`-th row on."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            rows = sampler_indices(self.rows, self.rank, self.world_size, self.epoch, seed=self.seed)
        else:
            rows = range(self.rank, len(self) * self.world_size, self.world_size)
        return iter(rows[self.start :])

    def __len__(self) -> int:
        """Rows that one rank sees in an epoch."""
        return self.rows // self.world_size


def packed_collate(rows: Sequence[dict[str, np.ndarray]]) -> dict:
    """Turns one row into a micro-batch for `SupervisedFinetune.forward`.

    Returns:
        {"data": {input_ids, labels, position_ids: int64 (1, packed_length); cumulative_len: int32 (documents + 1,);
        max_seqlen: int}, "data_samples": None}
    """
    if len(rows) != 1:
        raise ValueError(
            f"a micro-batch is one packed row, got {len(rows)}: raise max_length instead of batch_size"
        )
    row = rows[0]
    data = {
        name: torch.from_numpy(row[name]).unsqueeze(0) for name in ("input_ids", "labels", "position_ids")
    }
    data["cumulative_len"] = torch.from_numpy(row["cumulative_len"].astype(np.int32))
    data["max_seqlen"] = int(np.diff(row["cumulative_len"]).max())
    return {"data": data, "data_samples": None}
