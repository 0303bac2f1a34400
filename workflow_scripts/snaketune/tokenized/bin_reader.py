"""Reads tokenised files: `<file>.bin` and `<file>.bin.meta`."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import orjson

from snaketune.common.cli import UserError
from snaketune.tokenized.layout import meta_path

IGNORE_INDEX = -100


class TokenizedFile:
    """One `<file>.bin` with its `.bin.meta`, read through a memory map.

    Args:
        path: The `.bin` file; its meta file is `<path>.meta`.

    Attributes:
        offsets: int64 array (documents,), byte offset of each line.
        lengths: int64 array (documents,), tokens in each document, including BOS.

    Raises:
        UserError: The meta file is missing or does not belong to this `.bin`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        meta = read_meta(self.path)
        self.offsets = np.ascontiguousarray(meta[:, 0])
        self.lengths = np.ascontiguousarray(meta[:, 1])
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (input_ids, labels) of one document, see `read_line`."""
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self.offsets[index])
        end = self._map.find(b"\n", start)
        try:
            ids, labels = read_line(self._map[start : end if end >= 0 else None])
            if len(ids) != self.lengths[index]:
                raise ValueError(f"{len(ids)} tokens")
        except ValueError as error:
            raise UserError(
                f"{self.path}: the line at byte {start} does not match the meta file",
                found=error,
                expected=f'{{"tokens": [...]}} with {self.lengths[index]} tokens',
                fix="delete the file and its .meta and tokenise the dataset again",
            ) from None
        return ids, labels


def read_line(line: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns (input_ids, labels) of a `.bin` line: int64 arrays (tokens,), labels -100 where untrained.

    An id stored as 0 or as a negative number is untrained, so id 0 never trains, as in XTuner. The exact mask
    writes a trained 0 as `-0`, which XTuner reads as 0.

    Raises:
        ValueError: The line is not `{"tokens": [integers]}`.
    """
    try:
        stored = np.array(orjson.loads(line)["tokens"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if stored.ndim != 1 or (stored.dtype.kind != "i" and len(stored)):
        raise ValueError(f"tokens of shape {stored.shape} and type {stored.dtype}")
    stored = stored.astype(np.int64)
    trained = stored > 0
    if b"-0" in line:
        spelled = line[line.index(b"[") + 1 : line.rindex(b"]")].split(b",")
        trained |= [token.strip() == b"-0" for token in spelled]
    ids = np.abs(stored)
    return ids, np.where(trained, ids, IGNORE_INDEX)


def read_meta(path: Path) -> np.ndarray:
    """Returns a `.bin` file's meta data: int64 (documents, 2), byte offset and token count of each line.

    Raises:
        UserError: A file is missing, or the meta file is broken or belongs to a different `.bin`.
    """
    meta_file = meta_path(path)
    fix = "tokenise the dataset again (tokenize_dataset.py), or remove the file from the data order"
    if not path.is_file() or not meta_file.is_file():
        missing = meta_file if path.is_file() else path
        raise UserError(f"{missing} is missing", expected="a .bin file and its .bin.meta", fix=fix)
    try:
        with open(meta_file, "rb") as file:
            meta = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"{meta_file} cannot be read", found=error, expected="a NumPy array", fix=fix
        ) from None
    if meta.size == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if meta.ndim != 2 or meta.shape[1] < 2 or meta.dtype.kind not in "iu":
        raise UserError(
            f"{meta_file} is not a meta file",
            found=f"{meta.dtype} array of shape {meta.shape}",
            expected="int64 rows (byte offset, token count)",
            fix=fix,
        )
    meta = meta[:, [0, -1]].astype(np.int64)
    if meta[-1, 0] >= path.stat().st_size or (meta < 0).any():
        raise UserError(
            f"{meta_file} does not belong to its .bin",
            found=f"last offset {meta[-1, 0]}, file size {path.stat().st_size}",
            expected="offsets inside the file",
            fix=fix,
        )
    return meta
