"""Which checkpoint is converted, also of a training that goes on and removes its older ones."""

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
    """Returns (training config, run folder) of a run that trains or has trained.

    Args:
        run: A run folder, or the folder of a run's results, whose `checkpoints` holds run folders; the newest is taken.

    Raises:
        UserError: There is none.
    """
    newest = newest_run_folder(run)
    if newest is None:
        raise UserError(
            f"{run} is no run",
            expected="results/<run>, or a run folder below its checkpoints",
            fix="give the folder that the training wrote its checkpoints to",
        )
    return newest / TRAIN_CONFIG, newest


def open_checkpoint(pth: Path) -> tuple[Path, dict[str, Any], StoredTensors]:
    """Opens the checkpoint that `pth` means; what training removes afterwards can still be read to its end.

    Its bytes are compared with their digests, unless `pth` is a `train.json`: that has a digest of the weights.

    Returns:
        (the checkpoint, the record of the run if `pth` is its `train.json`, its weights)

    Raises:
        UserError: There is none, it is corrupt, or it was removed just now and is the one that was asked for.
    """
    from snaketune.checkpoints.checkpoint_folders import is_whole, read_state_dict

    while True:
        checkpoint, record = find_checkpoint(pth)
        marked = (checkpoint / MARKER).is_file()
        try:
            state = read_state_dict(checkpoint, verify=not record)
        except (UserError, FileNotFoundError):
            if not marked or is_whole(checkpoint) or (checkpoint / MARKER).is_file():
                raise
        else:
            # Training removes the marker first: where it still is, no file was missing.
            if not marked or (checkpoint / MARKER).is_file():
                return checkpoint, record, state
        if checkpoint == pth or record:
            raise UserError(
                f"{checkpoint} was removed while it was read",
                expected="a checkpoint that stays: training keeps the newest ones (save_total_limit)",
                fix="give the run folder, of which the newest is taken",
            )
        print(f"{checkpoint} was removed meanwhile; the next one is taken", flush=True)


def find_checkpoint(pth: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the checkpoint that `pth` means, and the record of the run if `pth` is its `train.json`."""
    from snaketune.checkpoints.checkpoint_folders import newest_whole_checkpoint

    if pth.is_file() and pth.suffix == ".json":
        record = read_json(pth)
        if "checkpoint" not in record:
            raise UserError(f"{pth} names no checkpoint", expected="the train.json that train_model.py wrote")
        return pth.parent / record["checkpoint"], record
    if pth.is_dir() and not (pth / MARKER).is_file() and not list(pth.glob("*.pt")):
        newest = newest_whole_checkpoint(pth)
        if newest is None:
            raise UserError(
                f"{pth} holds no whole checkpoint",
                found=", ".join(sorted(path.name for path in pth.iterdir())[:8]) or "an empty folder",
                expected="an iter_N.pth folder, or a run folder that holds some",
                fix="give the iter_N.pth folder, or train.json",
            )
        return newest, {}
    return pth, {}
