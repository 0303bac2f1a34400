"""Patches Snakemake 9.27 and its Slurm plugin 2.8 (included after all rules). No rules here.

- A failed job's message shows only the last lines of its logs, and names the copy that is kept (`keep_log`).
- A training that was refused (exit code 2: the user has to change something) is not tried again. Snakemake does not see
  exit codes, and on Slurm only that a job failed, so train_model.py leaves a file.
- The threads of submitted jobs are not capped at the cores of the submitting host (`cores: all` of profiles/default).
- Slurm is queried for all job states at least every `seconds-between-status-checks`. The plugin waits 10 seconds longer
  each time until a job ends, up to 180.
- A job that Slurm preempts without requeueing counts as ended and is submitted again. The plugin expects a PREEMPTED job
  to continue, and would wait forever. (squeue shows a requeued job as PENDING.)

The scheduler's patch is in rules/keep_back_jobs.smk, with the jobs that need it. tests/unit/test_adapt_snakemake.py
checks the Snakemake functions that the patches rely on.
"""

import os
import sys

import snakemake.logging
from snakemake.jobs import Job
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

SHOWN_LINES = 20


def show_last_lines(logs):
    """Replaces Snakemake's `show_logs`: yields the lines of the message."""
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


def unless_refused(times):
    """Wraps the getter of Snakemake's `Job.restart_times`: 0 for a training that was refused."""

    def restart_times(job):
        marker = Path(REFUSED.format(**job.wildcards_dict)) if job.rule.name == "train_model" else None
        # Listing the folder asks the file server; looking for one file may get an old answer.
        if marker and marker.parent.is_dir() and marker.name in os.listdir(marker.parent):
            return 0
        return times(job)

    return restart_times


def end_when_preempted(query):
    """Wraps the plugin's status query: turns squeue's PREEMPTED into CANCELLED, which counts as failed."""

    async def query_states(command, logger):
        states, seconds = await query(command, logger)
        if states and command.startswith("squeue"):
            states = {job: "CANCELLED" if state == "PREEMPTED" else state for job, state in states.items()}
        return states, seconds

    return query_states


snakemake.logging.show_logs = show_last_lines
Job.restart_times = property(unless_refused(Job.restart_times.fget))

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
