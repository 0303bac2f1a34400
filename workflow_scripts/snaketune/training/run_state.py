"""One run from start to manifest: which folder it lives in, where it goes on from, and what it leaves behind."""

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

from snaketune.checkpoints.checkpoint_folders import (
    is_last,
    is_resumable,
    list_checkpoints,
    read_state_dict,
    remove_leftovers,
)
from snaketune.checkpoints.weights_digest import weights_digest
from snaketune.common.cli import UserError
from snaketune.common.files import read_json, sha256_file, sha256_json, write_bytes, write_json
from snaketune.common.fingerprints import FingerprintCache
from snaketune.common.result_paths import FINISHED, IDENTITY, METRICS, TRAIN_CONFIG
from snaketune.packing.planner import plan_for_training
from snaketune.training.run_identity import differences, run_identity
from snaketune.training.run_lock import STALE, LockTaken, RunLock
from snaketune.training.train_config import TrainConfig


@dataclass
class RunState:
    """What is to be done.

    Attributes:
        folder: The run folder.
        identity: SHA-256 of the identity's fields.
        fields: The identity itself, see `run_identity`.
        world_size: Ranks of this attempt.
        checkpoint: What training goes on from, or what it ended with; None starts from the base model. Its bytes are
            not looked at here.
        trained: True when no step is left to train.
        finished: True when the record of the finished run is there too.
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
    """Finds the run folder for a config and what is in it already. Changes nothing but a cache of digests.

    Args:
        config: The training config.
        work_dir: Exactly this folder, or None.
        runs_dir: A folder of run folders, one an identity, or None.
        world_size: Ranks of the run.
        announce: Says when settings lead to a new folder beside others, and which checkpoints are torn.

    Raises:
        UserError: `work_dir` holds another run, or the run there cannot be resumed.
    """
    parent = runs_dir if work_dir is None else work_dir
    parent.mkdir(parents=True, exist_ok=True)
    cache = FingerprintCache(parent / ".digests.json")
    config.micro_batches_per_step(world_size)  # says so when the ranks cannot share a step
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
            f"{folder} holds another run; {len(changed)} settings differ (old -> new)",
            found="".join(f"\n    {line}" for line in changed),
            fix="undo the change, choose another --work-dir, or use --runs-dir, which gives each run its own folder",
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
                f"{folder} was cut off and cannot be resumed: its checkpoints hold weights only",
                found=f"{checkpoints[-1].name}, saved with save_optimizer = False",
                fix="set save_optimizer = True for runs that may be cut off; to train this one anew, delete the folder",
            )
        state.checkpoint = resumable[-1]
    return state


def _announce_other_runs(state: RunState) -> None:
    others = [path for path in state.folder.parent.glob(f"*/{IDENTITY}") if path.parent != state.folder]
    if others:
        newest = max(others, key=lambda path: path.stat().st_mtime)
        print(
            f"Notice: a new run in {state.folder}; the last one was {newest.parent.name} and stays. What differs:"
        )
        for line in differences(read_json(newest)["fields"], state.fields):
            print(f"  {line}", flush=True)


def open_run_folder(state: RunState, config_path: Path) -> RunLock:
    """Makes the run folder, keeps a second trainer out of it, and returns the lock: hold it while training.

    Raises:
        LockTaken: Another trainer works there.
    """
    # A trainer that was just killed on another host is given up by then.
    deadline = time.monotonic() + STALE + 30
    told = False
    while True:
        try:
            lock = RunLock(state.folder)
            break
        except LockTaken as owner:
            if time.monotonic() > deadline:
                raise
            if not told:
                print(f"Another trainer works in {state.folder}: {owner}. Waiting for it.", flush=True)
            told = True
            time.sleep(0.5)
    remove_leftovers(state.folder)
    write_json(
        state.folder / IDENTITY,
        {"format": 1, "identity": state.identity, "fields": state.fields, "world_size": state.world_size},
    )
    write_bytes(state.folder / TRAIN_CONFIG, config_path.read_bytes())
    return lock


def record_finished_run(state: RunState, config: TrainConfig, config_path: Path) -> None:
    """Writes finished.json from the last checkpoint and the metrics; reading the weights proves that they are whole."""
    checkpoint = list_checkpoints(state.folder)[-1]
    lines = [json.loads(line) for line in (state.folder / METRICS).read_text(encoding="utf-8").splitlines()]
    write_json(
        state.folder / FINISHED,
        {
            "format": 1,
            "identity": state.identity,
            "checkpoint": checkpoint.name,
            "weights_sha256": weights_digest(read_state_dict(checkpoint)),
            "steps": lines[-1]["step"],
            "epochs": lines[-1]["epoch"],
            "tokens": sum(line["tokens"] for line in lines),
            "rows_not_trained": rows_not_trained(config, state),
            "final_loss": lines[-1]["loss"],
            "world_size": state.world_size,
            "global_batch": state.fields["global_batch"],
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
    """Returns how many rows at the end of the last epoch fill no optimizer step; 0 where `max_steps` ends the run."""
    if config.max_steps:
        return 0
    rows = plan_for_training(**config.data).entries_per_epoch(config.data_ranks(state.world_size))
    return int(config.max_epochs * rows) % state.fields["global_batch"]


def write_manifest(state: RunState, manifest: Path) -> None:
    """Writes train.json: the record of a finished run, with paths relative to the manifest's folder."""
    record = read_json(state.folder / FINISHED)
    folder = os.path.relpath(state.folder, manifest.resolve().parent)
    write_json(manifest, {**record, "run_folder": folder, "checkpoint": f"{folder}/{record['checkpoint']}"})


def versions() -> dict[str, str | None]:
    """Returns the versions that a result depends on."""
    names = ("torch", "transformers", "deepspeed", "mmengine")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), "snaketune": git_commit(), **found}


def git_commit() -> str | None:
    """Returns the commit of this checkout, or None outside one."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
