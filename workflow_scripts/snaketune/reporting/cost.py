"""The cost of a run, from the workflow's benchmark files, and its packages against the environment lock."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from snaketune.common.packages import installed_versions, read_pins
from snaketune.common.run_files import RunFiles

_LABELS = ("", ".base", ".tuned")


def run_cost(run: RunFiles, benchmarks: Path, names: Collection[str]) -> list[dict[str, Any]]:
    """Returns `read_cost` for a run, counting all training attempts."""
    on_gpus = any("gpu_memory_mib" in record for record in run.metrics)
    return read_cost(benchmarks, names, _attempt_costs(run), on_gpus)


def read_cost(
    benchmarks: Path,
    names: Collection[str],
    attempts: Sequence[Mapping[str, float]] = (),
    on_gpus: bool = False,
) -> list[dict[str, Any]]:
    """Returns the cost of each stage, the total first.

    Args:
        benchmarks: Folder with `<stage>/<name>.tsv`, `<stage>/<name>.<label>.tsv` or
            `<stage>/<name>/....tsv`, written by Snakemake: seconds, MB of memory, processor seconds.
        names: Names of the run and of its shared data and tokenizer.
        attempts: Cost of each training attempt: `seconds`, `core_seconds`, `ranks`. The benchmark file covers
            only the last attempt, or a later job that found the training finished.
        on_gpus: True if each rank had a GPU.

    Returns:
        Mappings with `stage` (None: all), `jobs`, `seconds`, `core_hours` (processor time used), `gpu_hours`
        and `memory_mb` (maximum over the jobs). A job too short to be sampled adds only its time.
    """
    own = {f"{name}{label}.tsv" for name in names for label in _LABELS}
    stages: dict[str, list[dict[str, str]]] = {}
    for path in sorted(benchmarks.glob("*/**/*.tsv")):
        stage, name, *_ = path.relative_to(benchmarks).parts
        if name in own or name in names:
            with open(path, encoding="utf-8", newline="") as file:
                stages.setdefault(stage, []).extend(csv.DictReader(file, delimiter="\t"))
    rows = [_row(stage, jobs) for stage, jobs in stages.items()]
    for row in rows:
        if row["stage"] == "train_model" and attempts:
            _count_attempts(row, attempts, on_gpus)
    rows.sort(key=lambda row: -row["seconds"])
    if not rows:
        return []
    total: dict[str, Any] = {
        key: sum(row[key] for row in rows) for key in ("jobs", "seconds", "core_hours", "gpu_hours")
    }
    return [{"stage": None, **total, "memory_mb": max(row["memory_mb"] for row in rows)}, *rows]


def locked_packages(lock: Path) -> list[dict[str, Any]]:
    """Returns each package of a pip lock file with its installed version.

    Returns:
        Mappings with `name`, `locked`, `installed` (None: not installed) and `same` (ignoring a local part
        such as +cpu).
    """
    pins = read_pins(lock)
    installed = installed_versions(pins)
    return [
        {
            "name": name,
            "locked": locked,
            "installed": installed[name],
            "same": (installed[name] or "").partition("+")[0] == locked.partition("+")[0],
        }
        for name, locked in pins.items()
    ]


def _attempt_costs(run: RunFiles) -> list[dict[str, float]]:
    """Returns the cost of each attempt. Earlier releases recorded none: then only the ranks are known."""
    unknown = {"seconds": 0.0, "core_seconds": 0.0, "ranks": run.train["world_size"]}
    costs = run.attempts.get("costs", {})
    return [costs.get(str(n + 1), unknown) for n in range(run.attempts["attempts"])]


def _count_attempts(row: dict[str, Any], attempts: Sequence[Mapping[str, float]], on_gpus: bool) -> None:
    """Adds all attempts to the training row. The last counts as in its benchmark file, if that is more."""
    *earlier, last = attempts
    seconds = [each["seconds"] for each in earlier] + [max(last["seconds"], row["seconds"])]
    core_hours = [each["core_seconds"] / 3600 for each in earlier]
    core_hours.append(max(last["core_seconds"] / 3600, row["core_hours"]))
    row |= {"jobs": len(attempts), "seconds": sum(seconds), "core_hours": sum(core_hours)}
    if on_gpus:
        row["gpu_hours"] = (
            sum(each["ranks"] * time for each, time in zip(attempts, seconds, strict=True)) / 3600
        )


def _row(stage: str, jobs: list[dict[str, str]]) -> dict[str, Any]:
    seconds = sum(_number(job["s"]) for job in jobs)
    return {
        "stage": stage,
        "jobs": len(jobs),
        "seconds": seconds,
        "core_hours": sum(_number(job["cpu_time"]) for job in jobs) / 3600,
        "gpu_hours": 0.0,
        "memory_mb": max(_number(job["max_rss"]) for job in jobs),
    }


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:  # "-" or "NA": the job was too short to be sampled
        return 0.0
