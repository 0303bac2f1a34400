"""Reads the packed rows of a plan: the documents' lines, cut and laid end to end."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from snaketune.common.cli import UserError
from snaketune.packing.pack_plan import PackPlan, Slice
from snaketune.tokenized.bin_reader import IGNORE_INDEX, read_line

# Files that one reader keeps open: a data set may have more than a process is allowed to.
_OPEN_FILES = 128


class PackedSequences:
    """The rows of a plan, by number.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: PackPlan):
        self.plan = plan
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.plan)

    def __getstate__(self) -> dict:
        # Each loader process opens files of its own.
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Returns one row.

        Returns:
            `input_ids`, `labels` and `position_ids`: int64 arrays (tokens,), at most `max_length` of them;
            `cumulative_len`: int64 array (documents + 1,), the boundaries of the documents in the row, from 0 on.
            Labels are -100 where nothing is trained; in mode best_fit also at the first token of each document,
            which nothing in the row can predict. Mode xtuner keeps XTuner's labels: there the last token of a
            document predicts the first of the next.

        Raises:
            UserError: A line is not the one that was planned with.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        pieces = self.plan.row(number)
        documents = [self._read(piece) for piece in pieces]
        ids, labels = (np.concatenate(column) for column in zip(*documents, strict=True))
        sizes = np.array([piece.stop - piece.start for piece in pieces], dtype=np.int64)
        boundaries = np.concatenate([[0], np.cumsum(sizes)])
        if self.plan.mode == "best_fit":
            labels[boundaries[:-1]] = IGNORE_INDEX
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": np.arange(len(ids)) - np.repeat(boundaries[:-1], sizes),
            "cumulative_len": boundaries,
        }

    def _read(self, piece: Slice) -> tuple[np.ndarray, np.ndarray]:
        line = os.pread(self._handle(piece.file), piece.bytes, piece.offset)
        try:
            ids, labels = read_line(line)
            if len(ids) < piece.stop:
                raise ValueError(f"{len(ids)} tokens")
        except ValueError as error:
            raise UserError(
                f"{self._path(piece.file)}: the line at byte {piece.offset} is not what was planned with",
                found=error,
                expected=f'{{"tokens": [...]}} with at least {piece.stop} tokens',
                fix="delete the file and its .meta, tokenise the dataset again, and plan again",
            ) from None
        return ids[piece.start : piece.stop], labels[piece.start : piece.stop]

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
