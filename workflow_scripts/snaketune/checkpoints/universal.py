"""Going on with another number of ranks: DeepSpeed's universal checkpoint, which is cut along parameters, not ranks.

ZeRO-0 keeps everything on every rank and needs none. Above it, the optimizer's files of each rank are taken apart and
written again as one folder a parameter, from which any number of ranks reads its share.
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

    It needs as much room on the disk as the checkpoint, and DeepSpeed unpickles the files without restriction: they are
    trusted because this run wrote them.

    Raises:
        UserError: DeepSpeed could not convert it (on rank 0; the others fail with SystemExit).
    """
    target = checkpoint.parent / UNIVERSAL / checkpoint.name
    # The conversion of a large checkpoint takes longer than the ranks would otherwise wait for each other.
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
    """Removes what `make_universal` wrote."""
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
            f"{checkpoint} could not be converted for another number of ranks",
            found=(done.stderr.strip() or done.stdout.strip()).splitlines()[-1],
            fix="go on with the number of ranks that wrote it, see world_size in its COMPLETE.json",
        )
