"""The jobs of rules/follow_checkpoints.smk that read what a running training writes on its way. No rules here.

Snakemake 9.27 starts a job when the jobs before it have ended. Those of `AWAITED` have none before them, and are kept back
until the file that is named there exists, or until no training is left that could write it. They take no core meanwhile:
`JobScheduler.job_selector`, which chooses among the jobs that are ready, does not see them.
"""

import threading
import time

from snakemake.scheduling.job_scheduler import JobScheduler

AWAITED = {"list_checkpoints": TRAINING, "convert_checkpoint": f"{RUN}/{result_paths.PINNED_RECORD}"}
AWAITED_SECONDS = 3 if workflow.resource_settings.nodes is None else 20  # from one look to the next


def is_kept_back(job, scheduler):
    """Whether a job waits for a file of a training that may still write it."""
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
    """Wraps the scheduler's choice of jobs."""
    looked = 0.0

    def select_jobs(scheduler, jobs):
        nonlocal looked
        kept_back = {job for job in jobs if is_kept_back(job, scheduler)}
        if kept_back and time.monotonic() > looked + AWAITED_SECONDS:
            looked = time.monotonic()
            again = threading.Timer(AWAITED_SECONDS + 0.1, scheduler._open_jobs.release)
            again.daemon = True  # the end of Snakemake does not wait for it
            again.start()
        return select(scheduler, jobs - kept_back) if jobs - kept_back else []

    return select_jobs


if workflow.is_main_process:
    JobScheduler.job_selector = keep_back(JobScheduler.job_selector)
