"""Reads tensors in safetensors files lazily: neither a file nor a tensor has to fit in memory.

A file consists of the length of its header (eight bytes, little-endian), the header (JSON: type, shape and
offsets of each tensor) and the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from snaketune.checkpoints.stored_tensors import Extent, StoredTensor, StoredTensors
from snaketune.common.cli import UserError
from snaketune.common.files import read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def safetensors_files(folder: Path) -> list[Path]:
    """Returns the files that transformers reads: `model.safetensors`, those in the index, or else all."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def open_safetensors(folder: Path) -> StoredTensors:
    """Returns the tensors of a folder by name. Reads each tensor when it is accessed.

    Raises:
        UserError: The folder has no safetensors, or a file is missing or incomplete.
    """
    files = safetensors_files(folder)
    if not files:
        raise UserError(f"{folder} holds no safetensors", expected="*.safetensors")
    return StoredTensors({name: tensor for path in files for name, tensor in _read_header(path).items()})


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        file = open(path, "rb")  # noqa: SIM115 (stays open while its tensors may be read)
        length = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > length:
            raise ValueError(f"{length} bytes, shorter than its header")
        entries = json.loads(file.read(start - 8))
        entries.pop("__metadata__", None)
        stored, end = {}, start
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} has type {entry['dtype']}")
            dtype, shape = DTYPES[entry["dtype"]], torch.Size(entry["shape"])
            first, last = (start + offset for offset in entry["data_offsets"])
            if first < start or last - first != shape.numel() * dtype.itemsize:
                raise ValueError(f"{last - first} bytes for {name} of shape {list(shape)}")
            stored[name] = StoredTensor(shape, (Extent(file, first, dtype, shape.numel()),))
            end = max(end, last)
        if end != length:
            raise ValueError(f"{length} bytes instead of {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors",
            found=str(error),
            expected="a complete file with tensors of these types: " + ", ".join(DTYPES),
            fix="download or convert it again",
        ) from None
    return stored
