"""Reads the packed sequences of a plan: slices of documents, concatenated."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from snaketune.common.cli import UserError
from snaketune.packing.pack_plan import PackPlan, Slice
from snaketune.tokenized.bin_reader import IGNORE_INDEX, read_line

# Files that a reader keeps open. A dataset may have more files than a process may open.
_OPEN_FILES = 128


class PackedSequences:
    """The packed sequences (rows) of a plan, by number.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: PackPlan):
        self.plan = plan
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.plan)

    def __getstate__(self) -> dict:
        # Each data loader process opens its own files.
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Returns one row.

        Returns:
            `input_ids`, `labels` and `position_ids`: int64 arrays (tokens,), with at most `max_length`
            tokens; `cumulative_len`: int64 array (documents + 1,), the boundaries of the documents in the
            row, from 0. Labels are -100 at tokens that are not trained on. So is the first label of
            each document, which nothing in the row can predict. Mode xtuner keeps XTuner's labels, where the
            last token of a document predicts the first token of the next.

        Raises:
            UserError: A line differs from the one that the plan was made from.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        slices = self.plan.row(number)
        documents = [self._read(each) for each in slices]
        ids, labels = (np.concatenate(column) for column in zip(*documents, strict=True))
        sizes = np.array([each.stop - each.start for each in slices], dtype=np.int64)
        boundaries = np.concatenate([[0], np.cumsum(sizes)])
        if self.plan.mode != "xtuner":
            labels[boundaries[:-1]] = IGNORE_INDEX
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": np.arange(len(ids)) - np.repeat(boundaries[:-1], sizes),
            "cumulative_len": boundaries,
        }

    def _read(self, which: Slice) -> tuple[np.ndarray, np.ndarray]:
        line = os.pread(self._handle(which.file), which.bytes, which.offset)
        try:
            ids, labels = read_line(line)
            if len(ids) < which.stop:
                raise ValueError(f"{len(ids)} tokens")
        except ValueError as error:
            raise UserError(
                f"{self._path(which.file)}: the line at byte {which.offset} does not match the pack plan",
                found=error,
                expected=f'{{"tokens": [...]}} with at least {which.stop} tokens',
                fix="delete the file and its .meta, tokenise the dataset again, and make the plan again",
            ) from None
        return ids[which.start : which.stop], labels[which.start : which.stop]

    def _path(self, file: int) -> Path:
        return self.plan.train_folder / self.plan.files[file]["name"]

    def _handle(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
        else:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            try:
                self._open[file] = os.open(self._path(file), os.O_RDONLY)
            except OSError as error:
                raise UserError(
                    f"{self._path(file)} cannot be read",
                    found=error.strerror,
                    fix="tokenise the dataset again, or correct the folder",
                ) from None
        return self._open[file]
