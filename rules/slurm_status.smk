"""A job that Slurm preempts and does not queue again has ended, and is to be submitted anew. No rules here.

snakemake-executor-plugin-slurm 2.8.0 takes the state PREEMPTED for one of a job that will go on, and waits for ever; but
squeue shows a job that was queued again as PENDING.
"""

import sys


def end_when_preempted(query):
    """Wraps the plugin's status query: squeue's PREEMPTED becomes CANCELLED, which the plugin counts as failed."""

    async def query_states(command, logger):
        states, seconds = await query(command, logger)
        if states and command.startswith("squeue"):
            states = {job: "CANCELLED" if state == "PREEMPTED" else state for job, state in states.items()}
        return states, seconds

    return query_states


if "snakemake_executor_plugin_slurm" in sys.modules:
    slurm_plugin = sys.modules["snakemake_executor_plugin_slurm"]
    slurm_plugin.query_job_status = end_when_preempted(slurm_plugin.query_job_status)
