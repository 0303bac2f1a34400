"""The cost table of a dry run: jobs, core-hours and GPU-hours per rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PlannedJob:
    """One job that a dry run would start.

    Attributes:
        rule: Name of its rule.
        submitted: True if it is submitted to a cluster; otherwise it runs on this host.
        cores: CPU cores of all its tasks.
        gpus: GPUs on all its nodes.
        minutes: Time limit, or None without one.
        benchmark: Benchmark file of an earlier run, which may not exist.
    """

    rule: str
    submitted: bool
    cores: int
    gpus: int
    minutes: float | None
    benchmark: Path | None


def planned_job(
    rule: str, submitted: bool, threads: int, resources: dict, benchmark: Path | None
) -> PlannedJob:
    """Returns a job from Snakemake's numbers, read as the Slurm executor reads them.

    Args:
        rule: Name of its rule.
        submitted: True if it is submitted to a cluster.
        threads: Cores on this host; on a cluster, cores per task if the resources lack `cpus_per_task`.
        resources: `tasks` or `tasks_per_node`, `nodes`, `cpus_per_task`, `gpu` (per job) or `gres`
            (`gpu:a100:4`, per node), `runtime`.
        benchmark: Benchmark file of an earlier run, or None.
    """
    nodes = max(1, int(resources.get("nodes") or 1))
    tasks = int(resources.get("tasks") or 0) or nodes * max(1, int(resources.get("tasks_per_node") or 1))
    cores = tasks * int(resources.get("cpus_per_task") or threads) if submitted else threads
    gpus = int(resources.get("gpu") or 0)
    gres = str(resources.get("gres") or "")
    if not gpus and gres.startswith("gpu"):
        count = gres.rpartition(":")[2]
        gpus = nodes * (int(count) if count.isdecimal() else 1)
    runtime = resources.get("runtime")
    minutes = float(runtime) if isinstance(runtime, int | float) else None
    return PlannedJob(rule, submitted, cores, gpus, minutes, benchmark)


def render_job_table(jobs: Sequence[PlannedJob], benchmarks: Path) -> str:
    """Returns the table, with the rules in the order of `jobs`.

    `core-hours` and `GPU-hours` count every job once, up to its time limit. `expected` uses the seconds of an
    earlier run of the same job, or else the mean of its rule; it is empty for rules that have not run.

    Args:
        jobs: In display order.
        benchmarks: Folder of the rules' benchmark files.
    """
    rules: dict[str, list[PlannedJob]] = {}
    for job in jobs:
        rules.setdefault(job.rule, []).append(job)
    head = ["rule", "jobs", "where", "cores", "GPUs", "limit", "core-hours", "GPU-hours", "expected"]
    rows, totals = [], [0.0, 0.0, 0.0]
    for rule, those in rules.items():
        hours = [(job.minutes or 0) / 60 for job in those]
        cores = sum(h * job.cores for h, job in zip(hours, those, strict=True))
        gpus = sum(h * job.gpus for h, job in zip(hours, those, strict=True))
        expected = _expected_core_hours(those, benchmarks / rule)
        for place, value in enumerate((cores, gpus, expected or 0)):
            totals[place] += value
        limits = {job.minutes for job in those}
        limit = f"{max(limits):.0f} min" if None not in limits else "none"
        rows.append(
            [
                rule,
                str(len(those)),
                "cluster" if those[0].submitted else "here",
                str(max(job.cores for job in those)),
                str(max(job.gpus for job in those) or ""),
                limit,
                f"{cores:.1f}",
                f"{gpus:.1f}" if gpus else "",
                "" if expected is None else f"{expected:.2f}",
            ]
        )
    submitted = sum(job.submitted for job in jobs)
    gpu_hours = f"{totals[1]:.1f}" if totals[1] else ""
    known = f"{totals[2]:.2f}" if any(row[-1] for row in rows) else ""
    rows.append(["total", str(len(jobs)), "", "", "", "", f"{totals[0]:.1f}", gpu_hours, known])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [_line(row, widths) for row in [head, ["-" * width for width in widths], *rows]]
    title = f"Dry run: {len(jobs)} jobs" + (f", {submitted} submitted to the cluster" if submitted else "")
    note = (
        "core-hours and GPU-hours: each job up to its time limit, without retries. "
        "expected: core-hours, estimated from earlier jobs of the rule."
    )
    return "\n".join([title, *lines, note]) + "\n"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        text.ljust(width) if i in (0, 2) else text.rjust(width)
        for i, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _expected_core_hours(jobs: Sequence[PlannedJob], folder: Path) -> float | None:
    """Uses the benchmark of each job, or else the mean of its rule's benchmarks."""
    known = [_seconds(job.benchmark) for job in jobs]
    if None in known:
        others = [seconds for path in folder.rglob("*.tsv") if (seconds := _seconds(path)) is not None]
        if not others:
            return None
        mean = sum(others) / len(others)
        known = [mean if seconds is None else seconds for seconds in known]
    return sum(seconds * job.cores for seconds, job in zip(known, jobs, strict=True)) / 3600


def _seconds(benchmark: Path | None) -> float | None:
    """Returns the first column, `s`, of a benchmark file, or None if the file is missing or incomplete."""
    try:
        return float(benchmark.read_text(encoding="utf-8").splitlines()[1].split("\t")[0])
    except (AttributeError, OSError, ValueError, IndexError):
        return None
