"""Writes and reads a checkpoint's content: weights, optimizer state and random states."""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from snaketune.checkpoints.checkpoint_folders import describe_files, is_intact, is_whole, seal
from snaketune.checkpoints.stored_tensors import StoredTensors, open_saved, stored_tensor
from snaketune.checkpoints.zero_weights import read_zero_state_dict
from snaketune.common.cli import UserError
from snaketune.common.result_paths import MARKER

WEIGHTS_ONLY = "weights.pt"


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
    distributed.all_gather_object(parts, describe_files(mine, flush=True))
    if rank == 0:
        # DeepSpeed copies its conversion scripts beside the checkpoint; we use convert_pth_to_hf.py.
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):
            (run_folder / script).unlink(missing_ok=True)
        marker = {"format": 2, "step": step, "total_steps": total_steps, "save_optimizer": save_optimizer}
        marker |= {"world_size": len(parts), "files": {k: v for part in parts for k, v in part.items()}}
        seal(temporary, target, marker)
    comm.barrier()
    return target


def _writer(name: str) -> int:
    """Returns the rank that wrote a file of a checkpoint."""
    found = re.search(r"(?:pp_rank|random_state_rank)_(\d+)", name)
    return int(found[1]) if found else 0


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
