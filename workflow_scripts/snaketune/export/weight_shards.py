"""Writes a model's weights as safetensors, chunk by chunk, so memory never holds a whole shard or tensor.

A finished shard gets its final name and its digest is recorded, so a killed conversion resumes with the next shard. A
file is a length, a JSON header and the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from snaketune.checkpoints.safetensors_files import DTYPES
from snaketune.checkpoints.stored_tensors import LoadedTensor, StoredTensor, StoredTensors, read_whole
from snaketune.checkpoints.weights_digest import WeightsDigest
from snaketune.common.files import fsync_path, read_json, sha256_json, write_json
from snaketune.common.progress import Progress
from snaketune.export.hf_folder import require_in_range
from snaketune.export.lora_merge import MergedTensor

_DONE = "shards.json"  # the finished shards; removed at the end
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Output:
    """A tensor to write, its type in the file, and how many of its rows to write (None: all)."""

    stored: StoredTensor | LoadedTensor | MergedTensor
    dtype: torch.dtype
    rows: int | None = None

    @property
    def shape(self) -> list[int]:
        """The shape in the file."""
        return [self.rows, *self.stored.shape[1:]] if self.rows is not None else list(self.stored.shape)

    @property
    def bytes(self) -> int:
        """The size in the file in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """Returns the tensor as stored in the file."""
        return read_whole(self.stored, self.dtype, self.rows)


def write_shards(
    outputs: Mapping[str, Output], folder: Path, max_shard_size: str, state: StoredTensors | None = None
) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Writes `model.safetensors`, or several files and their index.

    Args:
        outputs: The tensors to write, by their names in the files.
        folder: An existing folder; finished shards of a killed conversion of the same tensors are kept.
        max_shard_size: Size at which a new file starts, such as `2GB` or `500MB`.
        state: All weights, including the outputs; their digest is computed along the way.

    Returns:
        ({file: {"bytes", "sha256"}} of the shards, the digest of `state`)

    Raises:
        UserError: A value does not fit its type.
    """
    shards = _plan(outputs, parse_bytes(max_shard_size))
    shard_of = {name: file for file, names in shards.items() for name in names}
    identity = _identity(outputs, shards)
    done = _finished(folder, identity)
    if done:
        print(f"{len(done)} of {len(shards)} files are already finished", flush=True)
    digest = WeightsDigest() if state is not None else None
    sources = state.stored if state is not None else {name: each.stored for name, each in outputs.items()}
    progress = Progress("bytes", sum(each.bytes for each in outputs.values()))
    writer: _ShardWriter | None = None
    for name in sorted(sources):
        file = shard_of.get(name)
        if file is not None and (writer is None or writer.file != file) and file not in done:
            writer = _ShardWriter(folder, file, {each: outputs[each] for each in shards[file]})
        writes = file is not None and file not in done
        if not writes and digest is None:
            continue
        _copy(name, sources[name], outputs.get(name), writer if writes else None, digest)
        if file is not None:
            progress.add(file, bytes=outputs[name].bytes)
        if writes and name == shards[file][-1]:
            done[file] = writer.finish()
            write_json(folder / _DONE, {"identity": identity, "files": done})
    print(f"weights: {progress.finish()}", flush=True)
    (folder / _DONE).unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(each.bytes for each in outputs.values())
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        write_json(folder / "model.safetensors.index.json", index)
    return done, digest.hexdigest() if digest is not None else None


def parse_bytes(size: str) -> int:
    """Returns a size such as `2GB` (10^9 bytes each) or `2GiB` (2^30 bytes each) in bytes."""
    number, unit, binary = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?)B", size).groups()
    return int(number) * (1024 if binary else 1000) ** (_UNITS[unit] if unit else 0)


def _copy(
    name: str,
    stored: StoredTensor | LoadedTensor | MergedTensor,
    output: Output | None,
    writer: _ShardWriter | None,
    digest: WeightsDigest | None,
) -> None:
    """Reads a tensor once, for its digest and its output."""
    if digest is not None:
        digest.begin(name, stored.dtype, stored.shape)
    left = torch.Size(output.shape).numel() if writer is not None else 0
    for chunk in stored.chunks(None if digest is not None else output.rows):
        if digest is not None:
            digest.update(chunk)
        part, left = chunk[:left], max(0, left - chunk.numel())
        if part.numel():
            if output.dtype.is_floating_point:
                require_in_range(name, part, str(output.dtype).removeprefix("torch."))
            writer.write(part.to(output.dtype))


def _plan(outputs: Mapping[str, Output], limit: int) -> dict[str, list[str]]:
    """Returns {file: names}, names in order. A tensor larger than the limit gets a separate file."""
    groups: list[list[str]] = []
    size = limit
    for name in sorted(outputs):
        size += outputs[name].bytes
        if size > limit:
            groups.append([])
            size = outputs[name].bytes
        groups[-1].append(name)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, 1)
    }


def _identity(outputs: Mapping[str, Output], shards: dict[str, list[str]]) -> str | None:
    """Returns a digest of the outputs and of the versions of their source files; None if these are unknown."""
    if not all(each.stored.extents for each in outputs.values()):
        return None
    files = {extent.file for each in outputs.values() for extent in each.stored.extents}
    stats = {file.name: os.fstat(file.fileno()) for file in files}
    sources = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
    tensors = {
        name: [
            str(each.dtype),
            each.shape,
            each.stored.recipe if isinstance(each.stored, MergedTensor) else "",
        ]
        for name, each in outputs.items()
    }
    return sha256_json([shards, tensors, sources])


def remove_unfinished(folder: Path) -> None:
    """Removes everything that a killed conversion left in a folder, except finished shards and their list."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _DONE and path.suffix != ".safetensors":
            path.unlink()


def _finished(folder: Path, identity: str | None) -> dict[str, dict[str, Any]]:
    """Returns the finished shards of the same conversion, and removes all others."""
    try:
        said = read_json(folder / _DONE)
        done = said["files"] if identity is not None and said["identity"] == identity else {}
    except (OSError, ValueError, KeyError):
        done = {}
    for path in folder.glob("*.safetensors"):
        if path.name not in done:
            path.unlink()
    return {name: entry for name, entry in done.items() if _has_size(folder / name, entry["bytes"])}


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


class _ShardWriter:
    """Writes one file, under a temporary name until `finish`. Expects its tensors in the order of `outputs`."""

    def __init__(self, folder: Path, file: str, outputs: Mapping[str, Output]):
        self.file, self._path = file, folder / file
        self._temporary = folder / f"{file}.tmp"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, each in outputs.items():
            end = offset + each.bytes
            header[name] = {"dtype": _NAMES[each.dtype], "shape": each.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._size = 8 + len(text) + offset
        self._digest = hashlib.sha256()
        self._out = open(self._temporary, "wb", buffering=0)  # noqa: SIM115 (closed by finish)
        self._put(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, tensor: torch.Tensor) -> None:
        """Appends elements."""
        self._put(memoryview(tensor.view(torch.uint8).numpy()))

    def finish(self) -> dict[str, Any]:
        """Flushes the file, gives it its final name, and returns {"bytes", "sha256"}."""
        self._out.close()
        fsync_path(self._temporary)
        self._temporary.rename(self._path)
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def _put(self, data: memoryview) -> None:
        self._digest.update(data)
        while data:
            data = data[self._out.write(data) :]
