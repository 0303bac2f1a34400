"""The state of a run on disk: its folder, the checkpoint to resume from, and the final record."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketune.checkpoints.checkpoint_content import read_state_dict
from snaketune.checkpoints.checkpoint_folders import is_last, is_resumable, list_checkpoints, remove_leftovers
from snaketune.checkpoints.weights_digest import weights_digest
from snaketune.common.cli import UserError
from snaketune.common.files import read_json, sha256_file, sha256_json, write_bytes, write_json
from snaketune.common.fingerprints import FingerprintCache
from snaketune.common.result_paths import FINISHED, IDENTITY, METRICS, TRAIN_CONFIG
from snaketune.models.lora import adapted_in
from snaketune.packing.planner import plan_for_training
from snaketune.training.run_identity import differences, run_identity
from snaketune.training.run_lock import STALE, LockTaken, RunLock
from snaketune.training.train_config import TrainConfig


@dataclass
class RunState:
    """Progress of a run.

    Attributes:
        folder: The run folder.
        identity: SHA-256 of the identity's fields.
        fields: The identity itself, see `run_identity`.
        world_size: Ranks of this attempt.
        checkpoint: Checkpoint to resume from, or the final one; None starts from the base model. Its bytes
            are not verified here.
        trained: True if no steps are left to train.
        finished: True if the record of the finished run exists too.
    """

    folder: Path
    identity: str
    fields: dict[str, Any]
    world_size: int
    checkpoint: Path | None = None
    trained: bool = False
    finished: bool = False


def find_run_state(
    config: TrainConfig, work_dir: Path | None, runs_dir: Path | None, world_size: int, announce: bool = True
) -> RunState:
    """Finds the run folder for a config and reads its state. Changes nothing except a cache of digests.

    Args:
        config: The training config.
        work_dir: The run folder itself, or None.
        runs_dir: A folder of run folders, one per identity, or None.
        world_size: Ranks of the run.
        announce: True prints a notice if this starts a new run beside others, and warns about torn
            checkpoints.

    Raises:
        UserError: `work_dir` holds a different run, or its run cannot be resumed.
    """
    parent = runs_dir if work_dir is None else work_dir
    parent.mkdir(parents=True, exist_ok=True)
    cache = FingerprintCache(parent / ".digests.json")
    config.micro_batches_per_step(world_size)  # raises if the ranks cannot share a step
    fields = run_identity(config, world_size, cache)
    cache.save()
    identity = sha256_json(fields)
    folder = work_dir if work_dir is not None else runs_dir / identity[:12]
    state = RunState(folder.resolve(), identity, fields, world_size)
    if not (folder / IDENTITY).is_file():
        if work_dir is None and announce:
            _announce_other_runs(state)
        return state
    old = read_json(folder / IDENTITY)
    if old["identity"] != identity:
        changed = differences(old["fields"], fields)
        raise UserError(
            f"{folder} holds a different run; {len(changed)} settings differ (old -> new)",
            found="".join(f"\n    {line}" for line in changed),
            fix="undo the change, set a new --work-dir, or use --runs-dir, which keeps runs apart",
        )
    checkpoints = list_checkpoints(folder, warn=announce)
    if not checkpoints:
        return state
    finished = folder / FINISHED
    state.checkpoint = checkpoints[-1]
    state.finished = finished.is_file() and state.checkpoint.name == read_json(finished)["checkpoint"]
    state.trained = state.finished or is_last(state.checkpoint)
    if not state.trained:
        resumable = [path for path in checkpoints if is_resumable(path)]
        if not resumable:
            raise UserError(
                f"the run in {folder} cannot be resumed: its checkpoints hold weights only",
                found=f"{checkpoints[-1].name}, saved with save_optimizer = False",
                fix="delete the folder and train from scratch, with save_optimizer = True if it may stop early",
            )
        state.checkpoint = resumable[-1]
    return state


def _announce_other_runs(state: RunState) -> None:
    others = [path for path in state.folder.parent.glob(f"*/{IDENTITY}") if path.parent != state.folder]
    if others:
        newest = max(others, key=lambda path: path.stat().st_mtime)
        print(
            f"Notice: a new run in {state.folder}; the previous run {newest.parent.name} is kept. Differences:"
        )
        for line in differences(read_json(newest)["fields"], state.fields):
            print(f"  {line}", flush=True)


def open_run_folder(state: RunState, config_path: Path) -> RunLock:
    """Creates the run folder and returns its lock. Release the lock after training.

    Raises:
        LockTaken: Another trainer is running in the folder.
    """
    # By then, the lock of a trainer that was just killed on another host is stale.
    deadline = time.monotonic() + STALE + 30
    waited = False
    while True:
        try:
            lock = RunLock(state.folder)
            break
        except LockTaken as owner:
            if time.monotonic() > deadline:
                raise
            if not waited:
                print(
                    f"Another trainer is running in {state.folder}: {owner}. Waiting for it to end.",
                    flush=True,
                )
            waited = True
            time.sleep(0.5)
    remove_leftovers(state.folder)
    write_json(
        state.folder / IDENTITY,
        {"format": 1, "identity": state.identity, "fields": state.fields, "world_size": state.world_size},
    )
    write_bytes(state.folder / TRAIN_CONFIG, config_path.read_bytes())
    return lock


def record_finished_run(state: RunState, config: TrainConfig, config_path: Path) -> None:
    """Writes finished.json from the last checkpoint and the metrics. Reading the weights verifies them."""
    checkpoint = list_checkpoints(state.folder)[-1]
    weights = read_state_dict(checkpoint)
    lora = {} if config.lora is None else {"lora_adapts": adapted_in(weights)}
    lines = [json.loads(line) for line in (state.folder / METRICS).read_text(encoding="utf-8").splitlines()]
    write_json(
        state.folder / FINISHED,
        {
            "format": 1,
            "identity": state.identity,
            "checkpoint": checkpoint.name,
            "weights_sha256": weights_digest(weights),
            "steps": lines[-1]["step"],
            "epochs": lines[-1]["epoch"],
            "tokens": sum(line["tokens"] for line in lines),
            "rows_not_trained": rows_not_trained(config, state),
            "final_loss": lines[-1]["loss"],
            "world_size": state.world_size,
            "global_batch": state.fields["global_batch"],
            **lora,
            "zero_stage": config.zero_stage,
            "dtype": state.fields["dtype"],
            "plan_sha256": state.fields.get("plan"),
            "data_sha256": state.fields.get("data"),
            "config_sha256": sha256_file(config_path),
            "versions": versions(),
            "git_commit": git_commit(),
        },
    )


def rows_not_trained(config: TrainConfig, state: RunState) -> int:
    """Returns the number of rows at the end that fill no optimizer step; 0 if `max_steps` ends the run."""
    if config.max_steps:
        return 0
    rows = plan_for_training(**config.data).entries_per_epoch(config.data_ranks(state.world_size))
    return int(config.max_epochs * rows) % state.fields["global_batch"]


def write_manifest(state: RunState, manifest: Path) -> None:
    """Writes train.json: the record of a finished run, with paths relative to the folder of train.json."""
    record = read_json(state.folder / FINISHED)
    folder = os.path.relpath(state.folder, manifest.resolve().parent)
    write_json(manifest, {**record, "run_folder": folder, "checkpoint": f"{folder}/{record['checkpoint']}"})


def versions() -> dict[str, str | None]:
    """Returns the versions of the software that determines the result."""
    names = ("torch", "transformers", "deepspeed", "mmengine")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), "snaketune": git_commit(), **found}


def git_commit() -> str | None:
    """Returns the commit of this checkout, or None outside a Git repository."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
