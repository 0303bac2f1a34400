"""What belongs to a site lies in a file outside git, and reaches sbatch by `snakemake --profile slurm` alone."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.timeout(2400)


def test_the_site_file_decides_constraint_and_partition(project, converted):
    job = project.job("whole", "convert_pth_to_hf", states="all")
    said = project.cluster.run("scontrol", "show", "job", job).stdout
    assert "Partition=long" in said and "Features=local" in said
    assert "TimeLimit=02:00:00" in said, "the rule's own"
    assert "NumCPUs=4" in said, "however few cores the host has that submits it"
