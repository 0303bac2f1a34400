"""`snakemake --profile slurm preflight` looks at two nodes through Slurm, from where Snakemake runs."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.timeout(2400)


def test_preflight_on_the_partition(project, preflight):
    report = json.loads((project.folder / "results/shared/preflight/report.json").read_text())
    found = {check["name"]: check["found"] for check in report}
    assert found["shared files"].startswith("2 ranks on ")
    assert found["all-reduce"].startswith("gloo, 2 ranks: ")
    jobs = project.cluster.run("squeue", "-h", "-t", "all", "-o", "%D nodes %C cores %k").stdout.splitlines()
    assert any(job.startswith("2 nodes 2 cores rule_probe_partition") for job in jobs), jobs
