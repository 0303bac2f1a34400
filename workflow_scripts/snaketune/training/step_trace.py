"""What a step of a run learned from: its rows, their documents, and its loss."""

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
    """Returns the run folder for itself, for a train.json, or for a folder of a workflow's run.

    Of a workflow's run that is not finished, it is the run folder that was written to last.

    Raises:
        UserError: There is none.
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
    """Returns what optimizer step `step` (from 1) of a run learned from.

    Args:
        run: See `find_run_folder`; the run may be going on.
        step: The step.
        rank: Only this rank's share.
        processed_dir: The folder of the JSONL files, if not the one that the plan names.

    Returns:
        `run_folder`, `step`, `metrics` (the step's line of metrics.jsonl, None if it has not been trained yet), `rows`
        (each with `rank`, `micro_batch`, `epoch`, `entry` in the epoch, `row`, `tokens` and `documents`), `notes`. With
        `sequence_parallel` > 1 that many ranks, from `rank` on, share the row.

    Raises:
        UserError: No such run, step or rank, or its plan is gone or has changed.
    """
    folder = find_run_folder(run)
    record = read_json(folder / IDENTITY)
    fields = record["fields"]
    config = load_config(folder / TRAIN_CONFIG)
    plan = _plan_of(folder, config.data, fields.get("plan"))
    metrics, last = _metrics_of(folder / METRICS, step)
    global_batch = fields.get("global_batch") or fields["world_size"] * config.accumulative_counts
    # How many ranks shared the rows may have changed from one attempt to the next; their order has not. A step to come
    # is the last attempt's.
    line = metrics or (record if "world_size" in record else last)
    shared = line.get("sequence_parallel") or config.sequence_parallel
    known = line["world_size"] // shared if "world_size" in line else fields.get("world_size")
    groups = known or global_batch // config.accumulative_counts  # ranks, where they do not share their rows
    world_size = groups * shared
    if step < 1:
        raise UserError("--step cannot be used", found=step, expected="1 or more")
    if rank is not None and not 0 <= rank < world_size:
        raise UserError("--rank cannot be used", found=rank, expected=f"0 to {world_size - 1}")
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
    """Opens the plan that the run trains on. Paths in a config are relative to where it was trained from."""
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
            f"{arguments['plan']} is not the plan of this run any more",
            found=plan.sha256()[:12],
            expected=sha256[:12],
            fix="make it again from the data and the settings of the run (plan_packing.py)",
        )
    return plan


def _metrics_of(path: Path, step: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Returns the line of a step, if there is one, and the last line read, if there is any."""
    last: dict[str, Any] = {}
    for _, last in whole_lines(path):
        if last["step"] == step:
            return last, last
    return None, last
