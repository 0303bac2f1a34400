"""Packed rows as torch data: the dataset, the order a rank sees it in, and one row as tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from snaketune.packing.packed_sequences import PackedSequences
from snaketune.packing.planner import plan_for_training


class PackedDataset(Dataset):
    """The packed rows of a plan.

    Args:
        plan: A plan folder, as plan_packing.py writes it; None packs the files of a train folder as XTuner does.
        **data: What `plan_for_training` takes besides: folder, packed_length, data_order_path, seed, min_length.

    Raises:
        UserError: The plan or a file is missing or broken, or no file fills a row.
    """

    def __init__(self, plan: str | None = None, **data):
        self.plan = plan_for_training(plan, **data)
        self.rows = PackedSequences(self.plan)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """Returns `input_ids`, `labels`, `position_ids` (tokens,) and `cumulative_len` (documents + 1,)."""
        return self.rows[row]


class PackedSampler(Sampler):
    """The rows of this rank, epoch after epoch without end; starts anywhere at no cost.

    The rows of all epochs, one after the other, are one sequence. Its entry number `micro_batch * world_size + rank`
    is what the rank sees in a micro-batch, so optimizer step k takes the `accumulative_counts * world_size` entries
    from k times that number on: which ones does not depend on how many ranks share them.

    Args:
        dataset: A `PackedDataset`.
        shuffle: False takes the rows in their own order.
        seed: Not used: the order's seed is the plan's. Here because mmengine passes one.
        rank: Of this process; None asks torch.distributed. `world_size` likewise.
        sequence_parallel: Ranks that share a row, and so see the same ones: they count as one rank here.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        shuffle: bool = True,
        seed: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        sequence_parallel: int = 1,
    ):
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = rank if rank is not None else torch.distributed.get_rank() if running else 0
        world_size = world_size or (torch.distributed.get_world_size() if running else 1)
        self.rank, self.world_size = rank // sequence_parallel, world_size // sequence_parallel
        self.plan, self.shuffle = dataset.plan, shuffle
        self.entries_per_epoch = self.plan.entries_per_epoch(self.world_size)
        self.start = 0

    def seek(self, micro_batch: int) -> None:
        """Makes the next iteration begin after this rank's first `micro_batch` micro-batches."""
        self.start = micro_batch

    def __iter__(self) -> Iterator[int]:
        entry = self.start * self.world_size + self.rank
        opened, order = None, range(len(self.plan))
        while self.entries_per_epoch:
            epoch, place = divmod(entry, self.entries_per_epoch)
            if self.shuffle and epoch != opened:
                opened, order = epoch, self.plan.order(epoch)
            yield int(order[place])
            entry += self.world_size

    def __len__(self) -> int:
        """Whole micro-batches that a rank sees in an epoch."""
        return self.entries_per_epoch // self.world_size


def packed_collate(rows: Sequence[dict[str, np.ndarray]]) -> dict:
    """Turns one row into a micro-batch for `SupervisedFinetune.forward`.

    Returns:
        {"data": {input_ids, labels, position_ids: int64 (1, tokens); cumulative_len: int32 (documents + 1,);
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


def read_ahead(batches: Iterator[dict], depth: int) -> Iterator[dict]:
    """Yields the batches of an endless iterator; a thread reads the next `depth` of them meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, batches) for _ in range(depth))
        while True:
            batch = waiting.popleft().result()
            waiting.append(thread.submit(next, batches))
            yield batch
