"""Traces an optimizer step of a run: its packed sequences, their documents, and its loss."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from snaketune.common.cli import UserError
from snaketune.common.files import read_json
from snaketune.common.result_paths import IDENTITY, METRICS, TRAIN, TRAIN_CONFIG
from snaketune.common.run_files import newest_run_folder
from snaketune.packing.pack_plan import PackPlan
from snaketune.packing.planner import plan_for_training
from snaketune.packing.row_tracer import RowTracer
from snaketune.training.metrics_file import whole_lines
from snaketune.training.train_config import load_config


def find_run_folder(path: str | os.PathLike) -> Path:
    """Returns the run folder for a run folder, a train.json, or a results folder of the workflow.

    For an unfinished run of the workflow, returns the run folder that was written last.

    Raises:
        UserError: The path is not a run.
    """
    path = Path(path)
    if (path / TRAIN).is_file():
        path = path / TRAIN
    if path.is_file():
        path = path.parent / read_json(path).get("run_folder", "")
    newest = newest_run_folder(path)
    if newest is None:
        raise UserError(
            f"{path} is not a run",
            expected=f"a run folder (with {IDENTITY}), a {TRAIN}, or results/<run>",
            fix="correct --run",
        )
    return newest


def trace_step(
    run: str | os.PathLike, step: int, rank: int | None = None, processed_dir: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Returns the data and metrics of optimizer step `step` (from 1) of a run.

    Args:
        run: See `find_run_folder`; the run may still be training.
        step: The step.
        rank: Limits the rows to this rank's share.
        processed_dir: Folder of the JSONL files; None uses the one in the plan.

    Returns:
        `run_folder`, `step`, `metrics` (the step's line of metrics.jsonl, None if not trained yet), `rows`
        (each with `rank`, `micro_batch`, `epoch`, `entry` in the epoch, `row`, `tokens` and `documents`),
        `notes`. With `sequence_parallel` > 1, that many ranks, starting at `rank`, share the row.

    Raises:
        UserError: The run, step or rank does not exist, or the pack plan is missing or has changed.
    """
    folder = find_run_folder(run)
    record = read_json(folder / IDENTITY)
    fields = record["fields"]
    config = load_config(folder / TRAIN_CONFIG)
    plan = _plan_of(folder, config.data, fields.get("plan"))
    metrics, last = _metrics_of(folder / METRICS, step)
    global_batch = fields.get("global_batch") or fields["world_size"] * config.accumulative_counts
    # The number of ranks may differ between attempts; the order of the rows does not. A future step belongs
    # to the last attempt.
    line = metrics or (record if "world_size" in record else last)
    shared = line.get("sequence_parallel") or config.sequence_parallel
    known = line["world_size"] // shared if "world_size" in line else fields.get("world_size")
    # Ranks, or groups of ranks that share their rows.
    groups = known or global_batch // config.accumulative_counts
    world_size = groups * shared
    if step < 1:
        raise UserError("invalid --step", found=step, expected="1 or more")
    if rank is not None and not 0 <= rank < world_size:
        raise UserError("invalid --rank", found=rank, expected=f"0 to {world_size - 1}")
    tracer = RowTracer(plan, processed_dir)
    per_epoch = plan.entries_per_epoch(groups)
    rows = []
    for place in range(global_batch):
        micro_batch, own = divmod(place, groups)
        if rank is not None and own != rank // shared:
            continue
        epoch, entry = divmod((step - 1) * global_batch + place, per_epoch)
        row = int(plan.order(epoch)[entry])
        documents = tracer.row(row)
        rows.append(
            {
                "rank": own * shared,
                "micro_batch": micro_batch,
                "epoch": epoch,
                "entry": entry,
                "row": row,
                "tokens": sum(each.stop - each.start for each in documents),
                "documents": [each.as_json() for each in documents],
            }
        )
    return {
        "run_folder": str(folder),
        "step": step,
        "sequence_parallel": shared,
        "metrics": metrics,
        "rows": rows,
        "notes": tracer.notes,
    }


def _plan_of(folder: Path, data: dict[str, Any], sha256: str | None) -> PackPlan:
    """Opens the run's pack plan. Paths in a config are relative to the folder where training was started."""
    arguments = dict(data)
    name = "plan" if arguments.get("plan") else "folder"
    for base in (Path(), *folder.resolve().parents):
        if (base / arguments[name]).is_dir():
            for key in ("plan", "folder", "data_order_path"):
                if arguments.get(key):
                    arguments[key] = base / arguments[key]
            break
    plan = plan_for_training(**arguments)
    if sha256 is not None and plan.sha256() != sha256:
        raise UserError(
            f"{arguments['plan']} is no longer the pack plan of this run",
            found=plan.sha256()[:12],
            expected=sha256[:12],
            fix="recreate it from the data and settings of the run with plan_packing.py",
        )
    return plan


def _metrics_of(path: Path, step: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Returns the line of a step, or None, and the last line read, or an empty dict."""
    last: dict[str, Any] = {}
    for _, last in whole_lines(path):
        if last["step"] == step:
            return last, last
    return None, last
