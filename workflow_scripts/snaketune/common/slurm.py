"""The Slurm job that this process runs in."""

from __future__ import annotations

import os


def job_record() -> dict[str, str]:
    """Returns `slurm_job_id`, for the records of the files that a job writes; empty outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"slurm_job_id": job} if job else {}
