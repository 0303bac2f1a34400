"""Checkpoints that are either whole or absent.

A checkpoint is a folder `iter_N.pth`, saved after N optimizer steps. It is written under a temporary name and
flushed. It then gets its marker COMPLETE.json, which has the size and SHA-256 of every file, and is renamed.
The file `latest` beside it is updated last. Full checkpoints hold DeepSpeed's files (weights, optimizer,
schedulers) and one random state per rank. Weights-only checkpoints hold `weights.pt` and cannot be resumed.

File sizes reveal a torn checkpoint at no cost (`is_whole`). Finding a flipped bit takes reading every byte
(`is_intact`), which is done before training resumes from a checkpoint and before its weights are exported.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from snaketune.checkpoints.stored_tensors import StoredTensors, open_saved, stored_tensor
from snaketune.checkpoints.zero_weights import read_zero_state_dict
from snaketune.common.cli import UserError
from snaketune.common.files import fsync_path, read_json, sha256_file, write_json, write_text
from snaketune.common.result_paths import MARKER

LATEST = "latest"
UNIVERSAL = ".universal"  # holds a checkpoint while it is loaded with a different number of ranks
WEIGHTS_ONLY = "weights.pt"
_NAME = re.compile(r"iter_(\d+)\.pth")


def read_state_dict(pth: str | os.PathLike, verify: bool = True) -> StoredTensors:
    """Returns the trained weights of a checkpoint, by their names in transformers.

    Reads full checkpoints of every ZeRO stage (fp32, from the optimizer's copies), weights-only checkpoints
    (training dtype), and a single file `{"state_dict": ...}`. Unpickles only tensors and plain values. Reads
    each tensor when it is accessed.

    Args:
        pth: An `iter_N.pth` folder or file.
        verify: True reads every byte first and compares the digests with the marker.

    Raises:
        UserError: The checkpoint is missing, torn or corrupt.
    """
    pth = Path(pth)
    if pth.is_dir():
        if (pth / MARKER).is_file() and not (is_whole(pth) and (not verify or is_intact(pth))):
            raise UserError(
                f"{pth} is torn or corrupt: files differ from its {MARKER}",
                fix="delete it and start training again, which resumes from the checkpoint before it",
            )
        weights = pth / WEIGHTS_ONLY
        state = _open_file(weights) if weights.is_file() else read_zero_state_dict(pth)
    elif pth.is_file():
        state = _open_file(pth)
    else:
        raise UserError(f"{pth} does not exist", expected="an iter_N.pth folder of a training run")
    return StoredTensors({name.removeprefix("llm."): tensor for name, tensor in state.stored.items()})


def _open_file(path: Path) -> StoredTensors:
    content, file = open_saved(path)
    state = content.get("state_dict", content)
    return StoredTensors({name: stored_tensor(fake, file) for name, fake in state.items()})


def _load(file: Path) -> dict:
    return torch.load(file, map_location="cpu", weights_only=True)


def step_of(pth: str | os.PathLike) -> int:
    """Returns N of `iter_N.pth`."""
    return int(_NAME.fullmatch(Path(pth).name)[1])


def is_whole(pth: Path) -> bool:
    """True if every file that the marker lists exists with the right size."""
    try:
        files = read_json(pth / MARKER)["files"]
        return all((pth / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_intact(pth: Path, rank: int = 0, world_size: int = 1) -> bool:
    """True if this rank's share of a whole checkpoint's files matches the digests in the marker."""
    files = read_json(pth / MARKER)["files"]
    mine = sorted(files)[rank::world_size]
    found = _digests([pth / name for name in mine])
    return all(found[name]["sha256"] == files[name]["sha256"] for name in mine)


def set_aside(pth: Path) -> Path:
    """Renames a corrupt checkpoint to `corrupt_iter_N.pth`, so that nothing reads it. Returns that path."""
    target = pth.with_name(f"corrupt_{pth.name}")
    shutil.rmtree(target, ignore_errors=True)
    pth.rename(target)
    fsync_path(pth.parent)
    return target


def _digests(files: list[Path], flush: bool = False) -> dict[str, dict]:
    """Returns the size and SHA-256 of files by name; with `flush`, also flushes the files to disk.

    All files are processed in parallel.
    Hashing (1.5 GB/s per core) overlaps the flush, so on a slow disk it adds no time to a save.
    """
    with ThreadPoolExecutor() as pool:
        flushed = [pool.submit(fsync_path, file) for file in files if flush]
        digests = list(pool.map(sha256_file, files))
        for each in flushed:
            each.result()
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }


def is_resumable(pth: Path) -> bool:
    """True if a whole checkpoint includes the optimizer state."""
    return read_json(pth / MARKER)["save_optimizer"]


def saved_world_size(pth: Path) -> int:
    """Returns the number of ranks that wrote a whole checkpoint."""
    return read_json(pth / MARKER)["world_size"]


def is_last(pth: Path) -> bool:
    """True if a whole checkpoint was saved after the run's last step."""
    marker = read_json(pth / MARKER)
    return marker["step"] == marker["total_steps"]


def list_checkpoints(run_folder: str | os.PathLike, warn: bool = True) -> list[Path]:
    """Returns the whole checkpoints of a run folder, oldest first. Skips torn ones with a warning."""
    found = [
        path for path in Path(run_folder).glob("iter_*.pth") if path.is_dir() and _NAME.fullmatch(path.name)
    ]
    whole = []
    for path in sorted(found, key=step_of):
        if is_whole(path):
            whole.append(path)
        elif warn:
            print(f"warning: {path} is not a whole checkpoint; skipped", flush=True)
    return whole


def newest_whole_checkpoint(run_folder: str | os.PathLike) -> Path | None:
    """Returns the whole checkpoint with the most steps, or None."""
    return (list_checkpoints(run_folder) or [None])[-1]


def write_checkpoint(
    engine, run_folder: Path, step: int, total_steps: int, client_state: dict, save_optimizer: bool
) -> Path:
    """Saves `run_folder/iter_<step>.pth`. All ranks call it together.

    Args:
        engine: The DeepSpeed engine.
        run_folder: The run folder, at the same path on all ranks.
        step: Optimizer steps done.
        total_steps: Optimizer steps of the whole run.
        client_state: Plain values and tensors that `DeepSpeedStrategy.resume` returns.
        save_optimizer: False writes the weights only.
    """
    from deepspeed import comm
    from torch import distributed

    target = run_folder / f"iter_{step}.pth"
    temporary = run_folder / f".{target.name}.tmp"
    rank = comm.get_rank()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    comm.barrier()
    if save_optimizer:
        engine.save_checkpoint(
            str(run_folder),
            tag=temporary.name,
            client_state=client_state,
            save_latest=False,
            exclude_frozen_parameters=True,  # the base model has them, see snaketune.models.lora
        )
        torch.save(random_state(), temporary / _random_state_name(rank))
    else:
        stage3 = engine.zero_optimization_partition_weights()
        state = engine._zero3_consolidated_16bit_state_dict(True) if stage3 else engine.module_state_dict()
        if rank == 0:
            state = {name: tensor.detach().cpu() for name, tensor in state.items()}
            torch.save({"state_dict": state, "step": step}, temporary / WEIGHTS_ONLY)
    comm.barrier()
    # Each rank hashes the files it wrote: on its own node, from the page cache, in parallel.
    mine = [file for file in sorted(temporary.iterdir()) if _writer(file.name) == rank]
    parts: list = [None] * comm.get_world_size()
    distributed.all_gather_object(parts, _digests(mine, flush=True))
    if rank == 0:
        # DeepSpeed copies its conversion scripts beside the checkpoint; we use convert_pth_to_hf.py.
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):
            (run_folder / script).unlink(missing_ok=True)
        marker = {"format": 2, "step": step, "total_steps": total_steps, "save_optimizer": save_optimizer}
        marker |= {"world_size": len(parts), "files": {k: v for part in parts for k, v in part.items()}}
        _seal(temporary, target, marker)
    comm.barrier()
    return target


def _writer(name: str) -> int:
    """Returns the rank that wrote a file of a checkpoint."""
    found = re.search(r"(?:pp_rank|random_state_rank)_(\d+)", name)
    return int(found[1]) if found else 0


def _seal(temporary: Path, target: Path, marker: dict) -> None:
    write_json(temporary / MARKER, marker)
    fsync_path(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    fsync_path(target.parent)
    write_text(target.with_name(LATEST), f"{target.name}\n")


def prune_checkpoints(run_folder: Path, keep: int) -> None:
    """Removes all but the `keep` newest whole checkpoints; keep <= 0 keeps all."""
    if keep > 0:
        for path in list_checkpoints(run_folder, warn=False)[:-keep]:
            # Delete the marker first: after a kill, the remains must not look whole.
            (path / MARKER).unlink()
            shutil.rmtree(path)


def remove_leftovers(run_folder: Path) -> None:
    """Removes the remains of a killed save or prune."""
    for path in run_folder.glob(".iter_*.pth.tmp"):
        shutil.rmtree(path)
    shutil.rmtree(run_folder / UNIVERSAL, ignore_errors=True)
    for path in run_folder.glob("iter_*.pth"):
        if path.is_dir() and not (path / MARKER).is_file():
            shutil.rmtree(path)


def random_state() -> dict:
    """Returns the state of every random generator that training may use, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    numpy_state = [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached]
    state = {"torch": torch.get_rng_state(), "numpy": numpy_state, "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(pth: Path, rank: int) -> None:
    """Restores the state that `random_state` returned on this rank when the checkpoint was written.

    A rank that did not exist then keeps its initial state.
    """
    if not (pth / _random_state_name(rank)).is_file():
        return
    state = _load(pth / _random_state_name(rank))
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _random_state_name(rank: int) -> str:
    return f"random_state_rank_{rank}.pt"
