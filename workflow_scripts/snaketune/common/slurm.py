"""What Slurm says of the job that this process runs in."""

from __future__ import annotations

import os


def job_record() -> dict[str, str]:
    """Returns `slurm_job_id` for the record of what a job makes; nothing outside Slurm, where there is none to name."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"slurm_job_id": job} if job else {}
