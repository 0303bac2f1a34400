"""`snakemake --profile slurm preflight` looks at two nodes through Slurm, from where Snakemake runs."""

from __future__ import annotations

import json
import os
import signal

from drill_project import PATIENCE


def test_preflight_on_the_partition(project):
    running = project.start("preflight")
    try:
        assert running.wait(timeout=PATIENCE) == 0, project.said()[-6000:]
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert "preflight: pass" in project.said()
    report = json.loads((project.folder / "results/shared/preflight/report.json").read_text())
    found = {check["name"]: check["found"] for check in report}
    assert found["shared files"].startswith("2 ranks on ")
    assert found["all-reduce"].startswith("gloo, 2 ranks: ")
    jobs = project.cluster.run("squeue", "-h", "-t", "all", "-o", "%D nodes %C cores").stdout.splitlines()
    assert "2 nodes 2 cores" in jobs
