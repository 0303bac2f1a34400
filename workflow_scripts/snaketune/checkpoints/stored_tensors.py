"""Reads tensors in `torch.save` files in chunks: neither a file nor a tensor has to fit in memory.

The structure of a file is unpickled with `weights_only=True` and without its data: torch's fake tensors
record the offsets of their bytes, which are read from the file later. A file stays open as long as its
tensors are in use, so a checkpoint that is deleted in the meantime can still be read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from snaketune.common.cli import UserError

CHUNK = 1 << 20  # elements per read: 4 MB of fp32, which fits in the CPU cache


@dataclass(frozen=True)
class Extent:
    """Consecutive elements in a file: `count` of type `dtype`, starting at byte `offset`."""

    file: BinaryIO
    offset: int
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of this shape, made of consecutive extents in row-major order; padding may follow."""

    shape: torch.Size
    extents: tuple[Extent, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored elements."""
        return self.extents[0].dtype

    def chunks(self, rows: int | None = None) -> Iterator[torch.Tensor]:
        """Yields the elements in order, at most `CHUNK` at a time; `rows` limits them to the first rows."""
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        for extent in cut(self.extents, 0, torch.Size(shape).numel()):
            for start in range(0, extent.count, CHUNK):
                yield _read(extent, start, min(CHUNK, extent.count - start))

    def part(self, first: int, rows: int) -> StoredTensor:
        """Returns `rows` rows, starting at row `first`."""
        width = self.shape[1:].numel()
        return StoredTensor(
            torch.Size((rows, *self.shape[1:])), cut(self.extents, first * width, rows * width)
        )


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor in memory, with the interface of `StoredTensor`."""

    tensor: torch.Tensor
    extents: tuple[Extent, ...] = ()

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.tensor.dtype

    def chunks(self, rows: int | None = None) -> Iterator[torch.Tensor]:
        """Same as `StoredTensor.chunks`."""
        part = self.tensor if rows is None else self.tensor[:rows]
        yield from part.detach().contiguous().view(-1).split(CHUNK)


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors by name. Accessing one reads it whole; `stored` has them unread."""

    def __init__(self, stored: Mapping[str, StoredTensor]):
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_whole(self.stored[name])

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def read_whole(
    stored: StoredTensor, dtype: torch.dtype | None = None, rows: int | None = None
) -> torch.Tensor:
    """Returns a tensor in memory.

    Args:
        stored: The tensor, or an object with the interface of `StoredTensor`.
        dtype: Type of the result; None keeps the stored type.
        rows: Number of leading rows to read; None reads all.
    """
    shape = stored.shape if rows is None else (rows, *stored.shape[1:])
    result, at = torch.empty(shape, dtype=dtype or stored.dtype), 0
    for chunk in stored.chunks(rows):
        result.view(-1)[at : at + len(chunk)] = chunk
        at += len(chunk)
    return result


def open_saved(path: Path, known_types: Iterable[Any] = ()) -> tuple[Any, BinaryIO]:
    """Returns the content of a `torch.save` file, with fake tensors in place of tensors, and the open file.

    Args:
        path: The file.
        known_types: Additional types that the file may contain, see `torch.serialization.safe_globals`.
    """
    file = open(path, "rb")  # noqa: SIM115 (stays open while its tensors may be read)
    with torch.serialization.safe_globals(list(known_types)), FakeTensorMode():
        return torch.load(file, map_location="cpu", weights_only=True), file


def stored_tensor(fake: torch.Tensor, file: BinaryIO) -> StoredTensor:
    """Returns the location in the file of a fake tensor from `open_saved`."""
    if not fake.is_contiguous():
        raise UserError(f"{file.name} has a tensor that is not contiguous", found=fake.stride())
    offset = fake.untyped_storage()._checkpoint_offset + fake.storage_offset() * fake.element_size()
    return StoredTensor(fake.shape, (Extent(file, offset, fake.dtype, fake.numel()),))


def cut(extents: Iterable[Extent], start: int, count: int) -> tuple[Extent, ...]:
    """Returns `count` elements from `start` of extents taken as one vector, or fewer at its end."""
    found = []
    for extent in extents:
        first, last = max(start, 0), min(start + count, extent.count)
        if first < last:
            offset = extent.offset + first * extent.dtype.itemsize
            found.append(Extent(extent.file, offset, extent.dtype, last - first))
        start -= extent.count
    return tuple(found)


def _read(extent: Extent, start: int, count: int) -> torch.Tensor:
    result = torch.empty(count, dtype=extent.dtype)
    buffer = memoryview(result.view(torch.uint8).numpy())
    offset = extent.offset + start * extent.dtype.itemsize
    while buffer:
        done = os.preadv(extent.file.fileno(), [buffer], offset)
        if not done:
            raise UserError(f"{extent.file.name} is truncated", fix="convert another checkpoint")
        buffer, offset = buffer[done:], offset + done
    return result
