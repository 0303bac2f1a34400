"""Pins checkpoints for evaluation while training continues and removes its older checkpoints.

A pinned checkpoint is `held/iter_N.pth` in the run folder. It consists of hard links, which take no space
until training removes its own copy, or of the weights only if training saved nothing at that step.
`held/iter_N.json` is written once the checkpoint is whole and flushed, and remains after the evaluation
removes the checkpoint: a step with this file is never pinned again, even if a resumed run trains it again.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from snaketune.checkpoints.checkpoint_folders import is_whole, list_checkpoints, remove_leftovers, step_of
from snaketune.common.cli import UserError
from snaketune.common.files import fsync_path, link_or_copy, read_json, write_bytes, write_json
from snaketune.common.result_paths import FINISHED, IDENTITY, MARKER, PINNED, TRAIN_CONFIG


@dataclass(frozen=True)
class PinPolicy:
    """Which checkpoints of a run to pin.

    Attributes:
        every: Optimizer steps between pinned checkpoints; 0 pins none.
        record: The JSON file that `open` writes, if any.
    """

    every: int = 0
    record: Path | None = None

    @classmethod
    def from_text(cls, every: str, save_steps: int, record: Path | None) -> PinPolicy:
        """Parses a number of steps; `save` pins as often as training saves."""
        if every == "save":
            return cls(save_steps, record)
        if not every.isdecimal():
            raise UserError("invalid --hold-every", found=every, expected="save, or a number of steps")
        return cls(int(every), record)

    def steps(self, total_steps: int) -> range:
        """Returns the steps to pin. Excludes the last step, whose checkpoint is the run's result."""
        return range(self.every, total_steps, self.every) if self.every > 0 else range(0)

    def open(self, run_folder: Path, done: int, total_steps: int) -> frozenset[int]:
        """Pins checkpoints that earlier attempts saved but did not pin, and writes `record`.

        The record has `identity`, `run_folder` (relative to the record), `total_steps`, and the `steps` whose
        checkpoints were or will be pinned. It leaves out steps whose checkpoints were removed before anyone
        asked to pin them.

        Args:
            run_folder: Where training saves.
            done: Optimizer steps already trained.
            total_steps: Optimizer steps of the whole run.

        Returns:
            The steps after `done` still to pin, without those that an earlier attempt pinned.
        """
        steps = self.steps(total_steps)
        pinned = run_folder / PINNED
        if steps:
            pinned.mkdir(exist_ok=True)
            remove_leftovers(pinned)
        for folder in (run_folder, pinned):
            for step in map(step_of, list_checkpoints(folder, warn=False)):
                if step in steps and not was_pinned(run_folder, step):
                    pin(run_folder, step)
        coming = frozenset(step for step in steps if step > done and not was_pinned(run_folder, step))
        if self.record is not None:
            write_json(
                self.record,
                {
                    "format": 1,
                    "identity": read_json(run_folder / IDENTITY)["identity"],
                    "run_folder": os.path.relpath(run_folder, self.record.resolve().parent),
                    "total_steps": total_steps,
                    "steps": [step for step in steps if step in coming or was_pinned(run_folder, step)],
                },
            )
        return coming


def pin_finished(run_folder: Path, pins: PinPolicy) -> None:
    """Like `PinPolicy.open`, for a run whose training is complete."""
    steps = read_json(run_folder / FINISHED)["steps"]
    pins.open(run_folder, steps, steps)


def was_pinned(run_folder: Path, step: int) -> bool:
    """True if the checkpoint of a step was ever pinned, even if evaluation has since removed it."""
    return (run_folder / PINNED / f"iter_{step}.json").is_file()


def pin(run_folder: Path, step: int) -> None:
    """Pins `iter_<step>.pth`, saved in the run folder or directly in `held/`. One process calls it."""
    folder = run_folder / PINNED
    target = folder / f"iter_{step}.pth"
    if not is_whole(target):
        shutil.rmtree(target, ignore_errors=True)
        temporary = folder / f".{target.name}.tmp"
        shutil.copytree(run_folder / target.name, temporary, copy_function=link_or_copy)
        fsync_path(temporary)
        temporary.rename(target)
    for name in (IDENTITY, TRAIN_CONFIG):  # conversion reads them beside a checkpoint
        write_bytes(folder / name, (run_folder / name).read_bytes())
    write_json(
        folder / f"iter_{step}.json",
        {"format": 1, "step": step, "files": read_json(target / MARKER)["files"]},
    )
