"""Keeps back jobs that Snakemake would start too early. No rules here.

While a base's architecture is being proved, nothing else starts: a model that is refused must not cost more. Most jobs do
not read the proof, so it is not their input; otherwise other training settings would tokenise the data again.

The jobs of rules/follow_checkpoints.smk read the files of a running training.
Snakemake 9.27 starts a job when the jobs before it have ended. The jobs of `AWAITED` have none before them. They are kept
back until their file in `AWAITED` exists or no training is left that could write it. They use no core meanwhile:
`JobScheduler.job_selector`, which chooses among the ready jobs, does not see them.
"""

import threading
import time

from snakemake.scheduling.job_scheduler import JobScheduler

AWAITED = {"list_checkpoints": TRAINING, "convert_checkpoint": f"{RUN}/{result_paths.PINNED_RECORD}"}
AWAITED_SECONDS = 3 if workflow.resource_settings.nodes is None else 20  # between two checks


def is_kept_back(job, needed):
    """True if the job waits for a proof, or for a file that a training may still write.

    `needed` are the jobs that have not ended and can still succeed.
    """
    if job.is_group() or job.rule.name != "prove_architecture":
        if any(each.rule.name == "prove_architecture" for each in needed):
            return True
    if job.is_group() or job.rule.name not in AWAITED:
        return False
    if Path(AWAITED[job.rule.name].format(**job.wildcards_dict)).is_file():
        return False
    return any(each.rule.name == "train_model" and each.wildcards.run == job.wildcards.run for each in needed)


def keep_back(select):
    """Wraps `job_selector` to leave out the jobs that are kept back."""
    looked = 0.0

    def select_jobs(scheduler, jobs):
        nonlocal looked
        needed = [job for job in scheduler.workflow.dag.needrun_jobs() if job not in scheduler.failed]
        kept_back = {job for job in jobs if is_kept_back(job, needed)}
        if kept_back and time.monotonic() > looked + AWAITED_SECONDS:
            looked = time.monotonic()
            again = threading.Timer(AWAITED_SECONDS + 0.1, scheduler._open_jobs.release)
            again.daemon = True  # Snakemake does not wait for it at exit
            again.start()
        return select(scheduler, jobs - kept_back) if jobs - kept_back else []

    return select_jobs


if workflow.is_main_process:
    JobScheduler.job_selector = keep_back(JobScheduler.job_selector)
