"""Finds the checkpoint to convert, even while training is running and removing older ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketune.common.cli import UserError
from snaketune.common.files import read_json
from snaketune.common.result_paths import MARKER, TRAIN_CONFIG
from snaketune.common.run_files import newest_run_folder

if TYPE_CHECKING:
    from snaketune.checkpoints.stored_tensors import StoredTensors


def find_run(run: Path) -> tuple[Path, Path]:
    """Returns (training config, run folder) of a run that is training or has finished.

    Args:
        run: A run folder, or a results folder with run folders below `checkpoints`; the newest is used.

    Raises:
        UserError: No run was found.
    """
    newest = newest_run_folder(run)
    if newest is None:
        raise UserError(
            f"{run} is not a run",
            expected="results/<run>, or a run folder below its checkpoints",
            fix="pass the folder that training wrote its checkpoints to",
        )
    return newest / TRAIN_CONFIG, newest


def open_checkpoint(pth: Path) -> tuple[Path, dict[str, Any], StoredTensors]:
    """Opens the checkpoint that `pth` refers to. It stays readable even if training removes it afterwards.

    Checks its bytes against their digests, unless `pth` is a `train.json`, which has a digest of the weights.

    Returns:
        (checkpoint, record of the run if `pth` is its `train.json`, weights)

    Raises:
        UserError: No checkpoint was found, it is corrupt, or it was named explicitly and has just been removed.
    """
    from snaketune.checkpoints.checkpoint_content import read_state_dict
    from snaketune.checkpoints.checkpoint_folders import is_whole

    while True:
        checkpoint, record = find_checkpoint(pth)
        marked = (checkpoint / MARKER).is_file()
        try:
            state = read_state_dict(checkpoint, verify=not record)
        except (UserError, FileNotFoundError):
            if not marked or is_whole(checkpoint) or (checkpoint / MARKER).is_file():
                raise
        else:
            # Training removes the marker first. If it is still there, no file was missing.
            if not marked or (checkpoint / MARKER).is_file():
                return checkpoint, record, state
        if checkpoint == pth or record:
            raise UserError(
                f"{checkpoint} was removed while it was being read",
                expected="a checkpoint that training keeps (the newest ones, see save_total_limit)",
                fix="pass the run folder to use its newest checkpoint",
            )
        print(f"{checkpoint} was removed in the meantime; using the next one", flush=True)


def find_checkpoint(pth: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the checkpoint that `pth` refers to, and the record of the run if `pth` is its `train.json`."""
    from snaketune.checkpoints.checkpoint_folders import newest_whole_checkpoint

    if pth.is_file() and pth.suffix == ".json":
        record = read_json(pth)
        if "checkpoint" not in record:
            raise UserError(f"{pth} does not name a checkpoint", expected="a train.json from train_model.py")
        return pth.parent / record["checkpoint"], record
    if pth.is_dir() and not (pth / MARKER).is_file() and not list(pth.glob("*.pt")):
        newest = newest_whole_checkpoint(pth)
        if newest is None:
            raise UserError(
                f"{pth} has no complete checkpoint",
                found=", ".join(sorted(path.name for path in pth.iterdir())[:8]) or "an empty folder",
                expected="an iter_N.pth folder, or a run folder that contains some",
                fix="pass the iter_N.pth folder, or train.json",
            )
        return newest, {}
    return pth, {}
