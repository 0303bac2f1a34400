"""What a run had learnt at each of its evaluated checkpoints, and which of them is best."""

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
        run: The run; its `train.json` is read, whose last step is the tuned model's.
        base: What evaluate_model.py and, perhaps, evaluate_tool_calls.py wrote about the base model: step 0.
        tuned: The same of the tuned model.
        evaluations: The same of the checkpoints between, in any order; each label is `iter_<step>`.
        metric: `loss` (held-out, nats per token) or a figure of `tool_call_tables.summarize` for all conversations.
        tuned_model: Hugging Face folder of the tuned model.

    Returns:
        {"format", "metric", "identity", "points", "best"}. A point: `step`, `model` (relative to the evaluations of the
        run; None for the base model), `figures` ({metric: {value, low, high}} with 95% intervals), `files` (SHA-256 of
        what it was read from). `best`: the step, model and value of the trained point with the best figure, the
        earliest of equals.

    Raises:
        UserError: The evaluations are not of this run, are of other conversations, or know no such figure.
    """
    train, identity = run.train, run.run_folder.name
    folder = run.path(names.EVALUATIONS)
    stages: dict[int, list[Path]] = {0: list(base), train["steps"]: list(tuned)}
    for path in evaluations:
        found = _STEP.fullmatch(str(read_json(path)["label"]))
        if found is None or path.parent.name != identity:
            raise UserError(
                f"{path} is not of a checkpoint of this training",
                found=f"{path.parent.name}, {read_json(path)['label']}",
                expected=f"{identity}, iter_<step>",
                fix="remove saved_checkpoints.json of this run, and run again",
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
    """Makes `link` a link to the model of the best point; its paths are relative to `folder`.

    Raises:
        UserError: That model is gone.
    """
    best = curve["best"]
    target = folder / best["model"]
    if not (target / names.MANIFEST).is_file():
        raise UserError(
            f"the best checkpoint by {curve['metric']} is step {best['step']}, whose model was removed",
            found=f"no {target}",
            expected="the model of the best checkpoint by the metric that was set when it was trained",
            fix="put evaluate.best_metric back; for other metrics afterwards train with evaluate.keep_models: all",
        )
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    temporary.replace(link)
    fsync_path(link.parent)


def remove_others(curve: dict[str, Any], folder: Path) -> None:
    """Removes the models of the checkpoints that are neither the best nor the last."""
    last = curve["points"][-1]["step"]
    for point in curve["points"]:
        if point["step"] not in (0, curve["best"]["step"], last):
            shutil.rmtree(folder / point["model"], ignore_errors=True)


def remove_held(run_folder: Path) -> None:
    """Removes the checkpoints that are still held for an evaluation, once all that are asked for have been evaluated.

    They are left by other settings of `evaluate.checkpoints` earlier in the same training. Their records go first: a step
    whose record is there counts as one that can be evaluated, or has been.
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
                    f"checkpoints were evaluated in different ways: {keys[0]} differs",
                    found=f"{first['label']}: {first[keys[0]]}, {other['label']}: {other[keys[0]]}",
                    fix="evaluate them all in the same way",
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
            f"no checkpoint has the figure {metric}",
            expected=", ".join(sorted(points[-1]["figures"])),
            fix="set evaluate.best_metric to another",
        )
    value, step, model = min(known)
    return {"step": step, "value": sign * value, "model": model}
