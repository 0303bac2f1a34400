"""`opencompass.runner: slurm`: the tasks are Slurm jobs of their own, asked for from within a job of the workflow."""

from __future__ import annotations

import json

import pytest
from drills import BENCHMARKS, LATER

pytestmark = pytest.mark.timeout(2400)


def test_tasks_are_jobs_and_failed_ones_are_told_with_their_log(project, opencompass, shared, benchmarked):
    """The partition that they ask for is added after the first attempt."""
    assert "1 of 1 datasets have no score" in shared.said() and "invalid partition" in shared.said()
    rows = json.loads((project.folder / BENCHMARKS).read_text())["scores"]
    assert [row["dataset"] for row in rows] == ["hello"] and 0 <= rows[0]["score"] <= 100
    jobs = project.cluster.run("squeue", "-h", "-t", "all", "-o", "%P %T %k %j").stdout.splitlines()
    for stage in ("Infer", "Eval"):
        task = f"{LATER} COMPLETED of the bench OpenICL{stage}[whole@iter_12-custom/hello]"
        assert any(job.startswith(task) for job in jobs), jobs
