"""What Snakemake 9.27 and its Slurm plugin 2.8 would do otherwise. No rules here; included after all rules.

- A failed job's message shows the last lines of its logs, not all of them, and names the copy that stays (`keep_log`).
- The threads of a submitted job are not cut to the cores of the host that submits it (`cores: all` of profiles/default).
- Slurm is asked for the states of all jobs every `seconds-between-status-checks` at the latest. The plugin waits 10
  seconds longer each time until a job ends, up to 180.
- A job that Slurm preempts and does not queue again has ended, and is submitted anew. The plugin takes PREEMPTED for
  the state of one that will go on, and waits for ever; but squeue shows a job that was queued again as PENDING.
- A job may read what a running job writes on its way: those of `AWAITED` are kept back until that file is there, or until
  no training is left that could write it. They take no core meanwhile.
"""

import sys
import threading
import time

import snakemake.logging
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

SHOWN_LINES = 20
AWAITED = {"list_checkpoints": TRAINING, "convert_checkpoint": f"{RUN}/{result_paths.HELD_RECORD}"}
AWAITED_SECONDS = 3 if workflow.resource_settings.nodes is None else 20  # from one look to the next


def show_last_lines(logs):
    """Takes the place of Snakemake's `show_logs`: yields the lines of its message."""
    for log in map(Path, logs):
        if not log.is_file():
            yield f"No log {log}"
            continue
        log = max(log.with_suffix("").glob("*.log"), key=lambda path: path.stat().st_mtime, default=log)
        lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        shown = lines[-SHOWN_LINES:]
        which = f"Last {len(shown)} of {len(lines)} lines of" if len(shown) < len(lines) else "All of"
        yield f"{which} {log}:"
        yield from (f"    {line}" for line in shown)


def end_when_preempted(query):
    """Wraps the plugin's status query: squeue's PREEMPTED becomes CANCELLED, which the plugin counts as failed."""

    async def query_states(command, logger):
        states, seconds = await query(command, logger)
        if states and command.startswith("squeue"):
            states = {job: "CANCELLED" if state == "PREEMPTED" else state for job, state in states.items()}
        return states, seconds

    return query_states


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


snakemake.logging.show_logs = show_last_lines

if workflow.is_main_process:
    JobScheduler.job_selector = keep_back(JobScheduler.job_selector)

if workflow.is_main_process and workflow.resource_settings.nodes is not None:
    workflow.global_resources["_cores"] = sys.maxsize
    growing = RemoteExecutor.next_seconds_between_status_checks
    RemoteExecutor.next_seconds_between_status_checks = growing.getter(
        lambda executor: min(
            growing.fget(executor), workflow.remote_execution_settings.seconds_between_status_checks
        )
    )

if "snakemake_executor_plugin_slurm" in sys.modules:
    slurm_plugin = sys.modules["snakemake_executor_plugin_slurm"]
    slurm_plugin.query_job_status = end_when_preempted(slurm_plugin.query_job_status)
