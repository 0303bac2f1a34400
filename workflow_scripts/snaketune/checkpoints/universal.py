"""Resumes with a different number of ranks: DeepSpeed's universal checkpoint.

A universal checkpoint is split by parameter instead of by rank. ZeRO-0 keeps everything on every rank and
needs none. For higher stages, each rank's optimizer files are rewritten as one folder per parameter, from
which any number of ranks can read its share.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from torch import distributed

from snaketune.checkpoints.checkpoint_folders import UNIVERSAL
from snaketune.common.cli import UserError


def make_universal(checkpoint: Path) -> Path:
    """Converts a full checkpoint of ZeRO stage 1 to 3 and returns the new folder. All ranks call it together.

    The conversion needs as much disk space as the checkpoint. DeepSpeed unpickles the files without
    restriction; they are trusted because this run wrote them.

    Raises:
        UserError: DeepSpeed could not convert it (on rank 0; other ranks raise SystemExit).
    """
    target = checkpoint.parent / UNIVERSAL / checkpoint.name
    # Converting a large checkpoint takes longer than the default timeout of a process group.
    patient = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    error: UserError | None = None
    if distributed.get_rank() == 0:
        print(f"Converting {checkpoint.name} for {distributed.get_world_size()} ranks", flush=True)
        try:
            _convert(checkpoint, target)
        except UserError as caught:
            error = caught
    outcome = [error is None]
    distributed.broadcast_object_list(outcome, group=patient)
    distributed.destroy_process_group(patient)
    if error is not None:
        raise error
    if not outcome[0]:
        raise SystemExit(2)
    return target


def remove_universal(run_folder: Path) -> None:
    """Removes the folders that `make_universal` wrote."""
    shutil.rmtree(run_folder / UNIVERSAL, ignore_errors=True)


def _convert(checkpoint: Path, target: Path) -> None:
    remove_universal(checkpoint.parent)
    target.mkdir(parents=True)
    workers = str(max(1, min(8, len(os.sched_getaffinity(0)))))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(target)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{checkpoint} could not be converted for a different number of ranks",
            found=(done.stderr.strip() or done.stdout.strip()).splitlines()[-1],
            fix="resume with the number of ranks that wrote it: world_size in its COMPLETE.json",
        )
