"""Packed sequences as torch data: the dataset, the sampler of a rank, and a packed sequence as tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from snaketune.packing.packed_sequences import PackedSequences
from snaketune.packing.planner import plan_for_training
from snaketune.settings.schema import default_of


class PackedDataset(Dataset):
    """The packed sequences of a pack plan.

    Args:
        plan: Pack plan folder, written by plan_packing.py; None packs the files of a train folder the way
            XTuner does.
        **data: Other arguments of `plan_for_training`: folder, packed_length, data_order_path, seed,
            min_length.

    Raises:
        UserError: The plan or a file is missing or broken, or no file fills a packed sequence.
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
    """Yields this rank's packed sequences, epoch after epoch without end. Seeking is free.

    The packed sequences of all epochs form one list, of which a rank sees entry
    `micro_batch * world_size + rank`. So optimizer step k uses `accumulative_counts * world_size` entries
    starting at k times that number: the same ones however many ranks share them.

    Args:
        dataset: A `PackedDataset`.
        shuffle: False keeps the order of the plan's rows.
        seed: Unused, because the plan has its own seed. mmengine passes one.
        rank: Rank of this process; None asks torch.distributed. The same applies to `world_size`.
        sequence_parallel: Ranks that share each packed sequence: they see the same ones and count as one rank
            here.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        shuffle: bool = True,
        seed: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        sequence_parallel: int = default_of("train.sequence_parallel"),
    ):
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = rank if rank is not None else torch.distributed.get_rank() if running else 0
        world_size = world_size or (torch.distributed.get_world_size() if running else 1)
        self.rank, self.world_size = rank // sequence_parallel, world_size // sequence_parallel
        self.plan, self.shuffle = dataset.plan, shuffle
        self.entries_per_epoch = self.plan.entries_per_epoch(self.world_size)
        self.start = 0

    def seek(self, micro_batch: int) -> None:
        """Makes the next iteration skip this rank's first `micro_batch` micro-batches."""
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
        """Returns the number of whole micro-batches that a rank sees in an epoch."""
        return self.entries_per_epoch // self.world_size


def packed_collate(rows: Sequence[dict[str, np.ndarray]]) -> dict:
    """Turns one packed sequence into a micro-batch for `SupervisedFinetune.forward`.

    Returns:
        {"data": {input_ids, labels, position_ids: int64 (1, tokens); cumulative_len: int32 (documents + 1,);
        max_seqlen: int}, "data_samples": None}
    """
    if len(rows) != 1:
        raise ValueError(
            f"a micro-batch is one packed sequence, got {len(rows)}: raise max_length instead of batch_size"
        )
    row = rows[0]
    data = {
        name: torch.from_numpy(row[name]).unsqueeze(0) for name in ("input_ids", "labels", "position_ids")
    }
    data["cumulative_len"] = torch.from_numpy(row["cumulative_len"].astype(np.int32))
    data["max_seqlen"] = int(np.diff(row["cumulative_len"]).max())
    return {"data": data, "data_samples": None}


def read_ahead(batches: Iterator[dict], depth: int) -> Iterator[dict]:
    """Yields the batches of an endless iterator, while a thread reads the next `depth` batches."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, batches) for _ in range(depth))
        while True:
            batch = waiting.popleft().result()
            waiting.append(thread.submit(next, batches))
            yield batch
