"""Packs tokenised conversations into rows of one length, in XTuner 0.2.0's order.

The row a run sees at step N follows from the `.bin` files, `packed_length` and two seeds alone, so a loss curve
can be laid beside one that XTuner drew. The rules (from XTuner's `JsonlDataset`, `PackedDataset` and
`InternRepoSampler`, written anew here):

* every file is packed on its own: its conversations are shuffled, laid end to end and cut every `packed_length`
  tokens; what is left over at the end of the file is dropped;
* a conversation that is cut goes on in the next row, with position ids that start at 0 again;
* the rows of all files, one file after the other, are shuffled anew each epoch and dealt to the ranks in turn.
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import numpy as np

from common.cli import UserError

IGNORE_INDEX = -100
PACKING_SEED = 1024


class TokenizedFile:
    """One `<file>.bin` with its `.bin.meta`, read through a memory map.

    Args:
        path: The `.bin` file; its meta file is `<path>.meta`.
        min_length: Conversations with fewer tokens are left out (0 keeps all).

    Attributes:
        offsets: int64 array (conversations,), byte offset of each line.
        lengths: int64 array (conversations,), tokens of each conversation, BOS included.

    Raises:
        UserError: The meta file is missing or is not the one of this `.bin`.
    """

    def __init__(self, path: str | os.PathLike, min_length: int = 0):
        self.path = Path(path)
        meta = _read_meta(self.path)
        if min_length > 0:
            meta = meta[meta[:, 1] >= min_length]
        self.offsets = np.ascontiguousarray(meta[:, 0])
        self.lengths = np.ascontiguousarray(meta[:, 1])
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict:
        # A memory map cannot be pickled; each loader worker opens its own.
        return {**self.__dict__, "_map": None}

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (input_ids, labels) of one conversation: int64 arrays (tokens,), labels -100 where untrained.

        An id stored as 0 or negative is untrained, but for a 0 that is spelled `-0` (see `ftdp.piece`).
        """
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self.offsets[index])
        end = self._map.find(b"\n", start)
        try:
            line = self._map[start : end if end >= 0 else None]
            stored = np.array(json.loads(line)["tokens"], dtype=np.int64)
            trained = stored > 0
            if b"-0" in line:
                trained |= [
                    each.strip() == b"-0"
                    for each in line[line.index(b"[") + 1 : line.rindex(b"]")].split(b",")
                ]
            if len(stored) != self.lengths[index]:
                raise ValueError(f"{len(stored)} tokens")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: the line at byte {start} is not what the meta file says",
                found=error,
                expected=f'{{"tokens": [...]}} with {self.lengths[index]} tokens',
                fix="delete the file and its .meta and tokenise the dataset again",
            ) from None
        ids = np.abs(stored)
        return ids, np.where(trained, ids, IGNORE_INDEX)


def _read_meta(path: Path) -> np.ndarray:
    meta_path = Path(f"{path}.meta")
    fix = "tokenise the dataset again (tokenize_dataset.py), or take the file out of the data order"
    if not path.is_file() or not meta_path.is_file():
        missing = meta_path if path.is_file() else path
        raise UserError(f"{missing} is missing", expected="a .bin file and its .bin.meta", fix=fix)
    try:
        with open(meta_path, "rb") as file:
            meta = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"{meta_path} cannot be read", found=error, expected="a NumPy array", fix=fix
        ) from None
    if meta.size == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if meta.ndim != 2 or meta.shape[1] < 2 or meta.dtype.kind not in "iu":
        raise UserError(
            f"{meta_path} is not a meta file",
            found=f"{meta.dtype} array of shape {meta.shape}",
            expected="int64 rows (byte offset, token count)",
            fix=fix,
        )
    meta = meta[:, [0, -1]].astype(np.int64)
    if meta[-1, 0] >= path.stat().st_size or (meta < 0).any():
        raise UserError(
            f"{meta_path} does not belong to its .bin",
            found=f"last offset {meta[-1, 0]}, file size {path.stat().st_size}",
            expected="offsets inside the file",
            fix=fix,
        )
    return meta


class PackedFile:
    """The rows of one tokenised file: `packed_length` tokens each, equal to XTuner's `PackedDataset`.

    Args:
        file: The tokenised file.
        packed_length: Tokens of a row.
        seed: Seed of the shuffle within the file.
    """

    def __init__(self, file: TokenizedFile, packed_length: int, seed: int = PACKING_SEED):
        self.file = file
        self.packed_length = packed_length
        order = np.arange(len(file))
        np.random.RandomState(seed).shuffle(order)
        self.order = order
        # Token t of the shuffled stream lies in the first conversation whose end is > t.
        self.ends = np.cumsum(file.lengths[order])
        self.num_tokens = int(self.ends[-1]) if len(file) else 0

    def __len__(self) -> int:
        return self.num_tokens // self.packed_length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns one row.

        Returns:
            `input_ids`, `labels` and `position_ids`: int64 arrays (packed_length,); `cumulative_len`: int64 array
            (documents + 1,), the borders of the documents in the row, from 0 to packed_length.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, stop = index * self.packed_length, (index + 1) * self.packed_length
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        ids, labels, positions, borders = [], [], [], [0]
        for place in range(first, last + 1):
            sample = int(self.order[place])
            begin_of_sample = int(self.ends[place] - self.file.lengths[sample])
            cut = slice(max(start - begin_of_sample, 0), stop - begin_of_sample)
            sample_ids, sample_labels = self.file[sample]
            ids.append(sample_ids[cut])
            labels.append(sample_labels[cut])
            positions.append(np.arange(len(ids[-1]), dtype=np.int64))
            borders.append(borders[-1] + len(ids[-1]))
        return {
            "input_ids": np.concatenate(ids),
            "labels": np.concatenate(labels),
            "position_ids": np.concatenate(positions),
            "cumulative_len": np.array(borders, dtype=np.int64),
        }


def sampler_indices(n: int, rank: int, world_size: int, epoch: int, seed: int = PACKING_SEED) -> list[int]:
    """Returns the row numbers that `rank` sees in `epoch`, in order, equal to XTuner's `InternRepoSampler`.

    Every rank gets `n // world_size` rows; the up to `world_size - 1` rows left over change with the epoch.
    """
    order = np.arange(n)
    np.random.RandomState(seed + epoch).shuffle(order)
    return order[rank : n // world_size * world_size : world_size].tolist()


def load_packed_files(
    train_folder: str | os.PathLike,
    data_order_path: str | os.PathLike | None,
    packed_length: int,
    seed: int = PACKING_SEED,
    min_length: int = 0,
) -> list[PackedFile]:
    """Returns the packed files of a train folder in the order that numbers their rows.

    Args:
        train_folder: `.../chatml_llamav13_32k/train`.
        data_order_path: A `data_order.txt` with one path a line, relative to `train_folder`; None walks the folder.
        packed_length: Tokens of a row.
        seed: Seed of the shuffle within each file.
        min_length: Conversations with fewer tokens are left out.

    Raises:
        UserError: A file is missing or broken, there is no file, or all files together hold no whole row.
    """
    from ftdp.data_order import list_train_files, read_data_order

    train_folder = Path(train_folder)
    names = read_data_order(data_order_path) if data_order_path else list_train_files(train_folder)
    files = [TokenizedFile(train_folder / name, min_length) for name in names]
    packed = [PackedFile(file, packed_length, seed) for file in files if len(file)]
    if not any(len(rows) for rows in packed):
        counts = ", ".join(
            f"{name}: {int(file.lengths.sum())}" for name, file in zip(names, files, strict=True)
        )
        largest = max((rows.num_tokens for rows in packed), default=0)
        raise UserError(
            f"{train_folder}: no file fills a row of {packed_length} tokens, so there is nothing to train on",
            found=f"tokens by file: {counts or 'no .bin file'}",
            expected=f"a file with at least {packed_length} tokens (each file is packed on its own)",
            fix=f"set max_length to {largest} or less, or add data" if largest else "check the data folder",
        )
    return packed
