"""What belongs to a site lies in a file outside git, and reaches sbatch by `snakemake --profile slurm` alone."""

from __future__ import annotations

import yaml


def test_the_site_file_decides_constraint_and_partition(project):
    partitions = {"main": {"max_runtime": 1}, "urgent": {"max_runtime": 1000}}
    (project.folder / "partitions.yaml").write_text(yaml.safe_dump({"partitions": partitions}))
    site = {
        "default-resources": {"constraint": "local"},
        "slurm-partition-config": "partitions.yaml",  # beside the site file
    }
    (project.folder / "site.yaml").write_text(yaml.safe_dump(site))
    try:
        running = project.start(
            "--set-threads", "split_heldout=4", "--until", "split_heldout", "--", "evaluate"
        )
        assert running.wait(timeout=300) == 0, project.said()[-6000:]
    finally:
        (project.folder / "site.yaml").unlink()
    newest = project.cluster.run("squeue", "-h", "-t", "all", "--sort=-i", "-o", "%i").stdout.split()[0]
    said = project.cluster.run("scontrol", "show", "job", newest).stdout
    assert "Partition=urgent" in said and "Features=local" in said
    assert "TimeLimit=02:00:00" in said, "the rule's own"
    assert "NumCPUs=4" in said, "however few cores the host has that submits it"
