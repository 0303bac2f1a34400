"""The figures of a run's evaluated checkpoints, and the best of them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snaketune.common import result_paths as names
from snaketune.common.cli import UserError
from snaketune.common.files import fsync_path, read_json, sha256_file
from snaketune.common.run_files import RunFiles
from snaketune.reporting.bootstrap import intervals, loss_ratios
from snaketune.reporting.run_comparison import HELDOUT_SAME
from snaketune.reporting.tool_call_tables import differing

LOSS = "loss"
_STEP = re.compile(r"iter_(\d+)")


def checkpoint_curve(
    run: RunFiles,
    base: Sequence[Path],
    tuned: Sequence[Path],
    evaluations: Sequence[Path],
    metric: str,
    tuned_model: Path,
) -> dict[str, Any]:
    """Reads the evaluations of one run.

    Args:
        run: The run. Its `train.json` gives the step of the tuned model.
        base: Files of evaluate_model.py, and optionally evaluate_tool_calls.py, for the base model: step 0.
        tuned: The same files for the tuned model.
        evaluations: The same files for the checkpoints in between, in any order; each label is `iter_<step>`.
        metric: `loss` (held-out, nats per token) or a figure of `tool_call_tables.summarize` for all
            conversations.
        tuned_model: Hugging Face folder of the tuned model.

    Returns:
        {"format", "metric", "identity", "points", "best"}. A point has `step`, `model` (path relative to the
        run's evaluations; None for the base model), `figures` ({metric: {value, low, high}} with 95%
        intervals) and `files` (SHA-256 of its source files). `best` is the step, model and value of the best
        trained point; the earliest wins ties.

    Raises:
        UserError: The evaluations are not of this run, use different conversations, or do not have the
            metric.
    """
    train, identity = run.train, run.run_folder.name
    folder = run.path(names.EVALUATIONS)
    stages: dict[int, list[Path]] = {0: list(base), train["steps"]: list(tuned)}
    for path in evaluations:
        found = _STEP.fullmatch(str(read_json(path)["label"]))
        if found is None or path.parent.name != identity:
            raise UserError(
                f"{path} is not an evaluation of this run's checkpoints",
                found=f"{path.parent.name}, {read_json(path)['label']}",
                expected=f"{identity}, iter_<step>",
                fix="delete saved_checkpoints.json of this run and run again",
            )
        stages.setdefault(int(found[1]), []).append(path)
    points = [
        _point(step, paths, folder, train["steps"], tuned_model) for step, paths in sorted(stages.items())
    ]
    _require_same([read_json(path) for _, paths in sorted(stages.items()) for path in paths])
    return {
        "format": 1,
        "metric": metric,
        "identity": train["identity"],
        "points": points,
        "best": _best(points, metric),
    }


def link_best(curve: dict[str, Any], folder: Path, link: Path) -> None:
    """Makes `link` a symlink to the model of the best point. Paths in `curve` are relative to `folder`.

    Raises:
        UserError: That model was removed.
    """
    best = curve["best"]
    target = folder / best["model"]
    if not (target / names.MANIFEST).is_file():
        raise UserError(
            f"the best checkpoint by {curve['metric']} is step {best['step']}, whose model was removed",
            found=f"no {target}",
            expected="the model of the best checkpoint by the metric set during training",
            fix="restore evaluate.best_metric; to change it later, train with evaluate.keep_models: all",
        )
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    temporary.replace(link)
    fsync_path(link.parent)


def remove_others(curve: dict[str, Any], folder: Path) -> None:
    """Removes the models of all checkpoints except the best and the last."""
    last = curve["points"][-1]["step"]
    for point in curve["points"]:
        if point["step"] not in (0, curve["best"]["step"], last):
            shutil.rmtree(folder / point["model"], ignore_errors=True)


def remove_pinned(run_folder: Path) -> None:
    """Removes checkpoints that are still pinned after all requested evaluations are done.

    They are left over from earlier settings of `evaluate.checkpoints` in the same training. Records are
    removed first: a step with a record counts as evaluated, or ready for evaluation.
    """
    for checkpoint in run_folder.glob("held/iter_*.pth"):
        checkpoint.with_suffix(".json").unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


def _point(step: int, paths: list[Path], folder: Path, last: int, tuned_model: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    model: Path | None = None
    for path in paths:
        result = read_json(path)
        if "summary" in result:
            figures |= {
                row["metric"]: {key: row[key] for key in ("value", "low", "high")}
                for row in result["summary"]
                if row["scope"] == "all"
            }
        else:
            figures[LOSS] = intervals(loss_ratios(result["conversations"], None))[LOSS]._asdict()
            if step:
                model = tuned_model if step == last else Path(result["model"])
    return {
        "step": step,
        "model": model and os.path.relpath(model, folder),
        "figures": figures,
        "files": {os.path.relpath(path, folder): sha256_file(path) for path in paths},
    }


def _require_same(results: list[dict[str, Any]]) -> None:
    for kind in (False, True):
        first, *others = [each for each in results if ("summary" in each) == kind] or [None]
        for other in others:
            keys = differing(first, other) if kind else [k for k in HELDOUT_SAME if first[k] != other[k]]
            if keys:
                raise UserError(
                    f"the checkpoints were not all evaluated in the same way: {keys[0]} differs",
                    found=f"{first['label']}: {first[keys[0]]}, {other['label']}: {other[keys[0]]}",
                    fix="evaluate them all with the same settings",
                )


def _best(points: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    sign = 1 if metric.startswith(LOSS) else -1
    known = [
        (sign * point["figures"][metric]["value"], point["step"], point["model"])
        for point in points
        if point["step"] and point["figures"].get(metric, {}).get("value") is not None
    ]
    if not known:
        raise UserError(
            f"no checkpoint has the metric {metric}",
            expected=", ".join(sorted(points[-1]["figures"])),
            fix="set evaluate.best_metric to one of these",
        )
    value, step, model = min(known)
    return {"step": step, "value": sign * value, "model": model}
