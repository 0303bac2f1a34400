"""Checkpoints held for evaluation, while training goes on and removes its older ones.

`held/iter_N.pth` in the run folder is a checkpoint by hard links, which takes no room until training removes its own, or
weights alone where training saved nothing at that step. `held/iter_N.json` is written once the checkpoint is whole and
flushed, and stays when the evaluation has removed the checkpoint: a step that has it is never held again, though a
resumed training may train it again.
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
    """Which checkpoints of a run are held.

    Attributes:
        every: Optimizer steps from one to the next; 0 holds none.
        record: The JSON file that `open` writes, if any.
    """

    every: int = 0
    record: Path | None = None

    @classmethod
    def from_text(cls, every: str, save_steps: int, record: Path | None) -> PinPolicy:
        """Takes the number of steps as text, `save` for as often as training saves."""
        if every == "save":
            return cls(save_steps, record)
        if not every.isdecimal():
            raise UserError("--hold-every cannot be used", found=every, expected="save, or a number of steps")
        return cls(int(every), record)

    def steps(self, total_steps: int) -> range:
        """Returns the steps to hold; the last is not among them: its checkpoint is the run's result."""
        return range(self.every, total_steps, self.every) if self.every > 0 else range(0)

    def open(self, run_folder: Path, done: int, total_steps: int) -> frozenset[int]:
        """Holds what an attempt before this one saved without recording it as held, and writes what there will be.

        The record: `identity`, `run_folder` (relative to the record), `total_steps`, and the `steps` whose checkpoints
        were held or will be; steps that were trained and removed before anybody asked for them are not among them.

        Args:
            run_folder: Where training saves.
            done: Optimizer steps that are trained.
            total_steps: Of the whole run.

        Returns:
            The steps after `done` to hold: not those that an attempt before this one held.
        """
        steps = self.steps(total_steps)
        held = run_folder / PINNED
        if steps:
            held.mkdir(exist_ok=True)
            remove_leftovers(held)
        for folder in (run_folder, held):
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
    """As `PinPolicy.open`, for a run that has been trained to its end."""
    steps = read_json(run_folder / FINISHED)["steps"]
    pins.open(run_folder, steps, steps)


def was_pinned(run_folder: Path, step: int) -> bool:
    """Tells whether the checkpoint of a step has been held, and perhaps been evaluated and removed since."""
    return (run_folder / PINNED / f"iter_{step}.json").is_file()


def pin(run_folder: Path, step: int) -> None:
    """Holds `iter_<step>.pth` of a run folder, or what was written into `held` itself. One process calls it."""
    folder = run_folder / PINNED
    target = folder / f"iter_{step}.pth"
    if not is_whole(target):
        shutil.rmtree(target, ignore_errors=True)
        temporary = folder / f".{target.name}.tmp"
        shutil.copytree(run_folder / target.name, temporary, copy_function=link_or_copy)
        fsync_path(temporary)
        temporary.rename(target)
    for name in (IDENTITY, TRAIN_CONFIG):  # a conversion reads them beside a checkpoint
        write_bytes(folder / name, (run_folder / name).read_bytes())
    write_json(
        folder / f"iter_{step}.json",
        {"format": 1, "step": step, "files": read_json(target / MARKER)["files"]},
    )
