"""Keeps back the jobs of rules/follow_checkpoints.smk that read the files of a running training. No rules here.

Snakemake 9.27 starts a job when the jobs before it have ended. The jobs of `AWAITED` have none before them. They are kept
back until their file in `AWAITED` exists or no training is left that could write it. They use no core meanwhile:
`JobScheduler.job_selector`, which chooses among the ready jobs, does not see them.
"""

import threading
import time

from snakemake.scheduling.job_scheduler import JobScheduler

AWAITED = {"list_checkpoints": TRAINING, "convert_checkpoint": f"{RUN}/{result_paths.PINNED_RECORD}"}
AWAITED_SECONDS = 3 if workflow.resource_settings.nodes is None else 20  # between two checks


def is_kept_back(job, scheduler):
    """True if the job waits for a file that a training may still write."""
    if job.is_group() or job.rule.name not in AWAITED:
        return False
    if Path(AWAITED[job.rule.name].format(**job.wildcards_dict)).is_file():
        return False
    return any(
        each.rule.name == "train_model" and each.wildcards.run == job.wildcards.run
        for each in scheduler.workflow.dag.needrun_jobs()
        if each not in scheduler.failed
    )


def keep_back(select):
    """Wraps `job_selector` to leave out the jobs that are kept back."""
    looked = 0.0

    def select_jobs(scheduler, jobs):
        nonlocal looked
        kept_back = {job for job in jobs if is_kept_back(job, scheduler)}
        if kept_back and time.monotonic() > looked + AWAITED_SECONDS:
            looked = time.monotonic()
            again = threading.Timer(AWAITED_SECONDS + 0.1, scheduler._open_jobs.release)
            again.daemon = True  # Snakemake does not wait for it at exit
            again.start()
        return select(scheduler, jobs - kept_back) if jobs - kept_back else []

    return select_jobs


if workflow.is_main_process:
    JobScheduler.job_selector = keep_back(JobScheduler.job_selector)
