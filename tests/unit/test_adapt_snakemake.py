"""The functions of Snakemake and its Slurm plugin that our patches rely on have not changed."""

from __future__ import annotations

import inspect
import re
from hashlib import sha256
from importlib.metadata import version
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import snakemake.api  # first: its modules import each other
import snakemake.logging
import snakemake.workflow
import snakemake_executor_plugin_slurm as slurm_plugin
from snakemake.jobs import Job
from snakemake.resources import Resources
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

ADAPT, KEEP_BACK = "adapt_snakemake.smk", "keep_back_jobs.smk"
STATUS_INTERVAL = RemoteExecutor.next_seconds_between_status_checks
FORMATTER = snakemake.logging.DefaultFormatter


class Reliance(NamedTuple):
    """A function that a patch replaces, or that calls the replaced function."""

    function: object
    sha256: str  # first 12 digits, of its source
    file: str
    reason: str


RELIANCES = {
    "show_logs": Reliance(
        snakemake.logging.show_logs,
        "b1308c0ca98b",
        ADAPT,
        "show_last_lines replaces it: a list of paths in, lines out",
    ),
    "_format_job_error": Reliance(
        FORMATTER._format_job_error,
        "e5ad1c0aab5e",
        ADAPT,
        "it looks up show_logs in its module when a job fails",
    ),
    "restart_times": Reliance(
        Job.restart_times.fget,
        "deb703b85c55",
        ADAPT,
        "unless_refused wraps it: the number of times that a failed job is started again",
    ),
    "_handle_error": Reliance(
        JobScheduler._handle_error,
        "255b52a98a34",
        ADAPT,
        "it asks restart_times after a job has failed",
    ),
    "job_selector": Reliance(
        JobScheduler.job_selector,
        "11a654075403",
        KEEP_BACK,
        "keep_back wraps it: a set of ready jobs in, those to start out",
    ),
    "schedule": Reliance(
        JobScheduler.schedule,
        "9f32db93a39b",
        KEEP_BACK,
        "releasing _open_jobs makes it select again; it passes job_selector a set and waits if none is returned",
    ),
    "needrun_jobs": Reliance(
        snakemake.workflow.DAG.needrun_jobs, "fb49d381caf9", KEEP_BACK, "trainings among them have not ended"
    ),
    "growing interval, read": Reliance(
        STATUS_INTERVAL.fget, "e371ad38e629", ADAPT, "it is capped: seconds from one status check to the next"
    ),
    "growing interval, set": Reliance(
        STATUS_INTERVAL.fset, "12d8190dd726", ADAPT, "the plugin lets it grow by this"
    ),
    "sleep": Reliance(
        RemoteExecutor.sleep, "47fa6b8f83bd", ADAPT, "it waits for as long as the capped property says"
    ),
    "query_job_status": Reliance(
        slurm_plugin.query_job_status,
        "e0a595a37ef2",
        ADAPT,
        "end_when_preempted wraps it: (states by job id, seconds)",
    ),
    "check_active_jobs": Reliance(
        slurm_plugin.Executor.check_active_jobs,
        "a15ec905e07e",
        ADAPT,
        "it looks up query_job_status in its module; CANCELLED means failed to it, PREEMPTED continuing",
    ),
}


def versions() -> str:
    packages = ("snakemake", "snakemake-executor-plugin-slurm", "snakemake-interface-executor-plugins")
    return ", ".join(f"{package} {version(package)}" for package in packages)


@pytest.mark.parametrize("name", RELIANCES)
def test_the_functions_that_patches_rely_on_are_those_they_were_written_for(name):
    reliance = RELIANCES[name]
    found = sha256(inspect.getsource(reliance.function).encode()).hexdigest()[:12]
    assert found == reliance.sha256, (
        f"{reliance.function.__module__}.{reliance.function.__qualname__} changed ({versions()}).\n"
        f"Check rules/{reliance.file}, which relies on it: {reliance.reason}.\n"
        f"Read the new function ({inspect.getsourcefile(reliance.function)}), adapt the patch or drop it, run "
        "tests/workflow/test_failed_job.py, tests/workflow/test_refused_training.py, tests/workflow/test_follow_checkpoints.py and tests/slurm, then update the "
        f"digest: {found}"
    )


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (snakemake.logging.show_logs, ["logs"]),
        (JobScheduler.job_selector, ["self", "jobs"]),
        (slurm_plugin.query_job_status, ["command", "logger"]),
    ],
)
def test_what_is_replaced_is_called_as_the_replacement_expects(function, parameters):
    assert list(inspect.signature(function).parameters) == parameters, (
        f"{function.__qualname__} has different parameters ({versions()}); check its replacement in rules/*.smk"
    )


def test_the_versions_in_the_rules_are_the_installed_ones(repo_root):
    stated = re.search(
        r"Snakemake ([\d.]+) and its Slurm plugin ([\d.]+)", (repo_root / "rules" / ADAPT).read_text()
    )
    installed = [
        version(name).rpartition(".")[0] for name in ("snakemake", "snakemake-executor-plugin-slurm")
    ]
    assert list(stated.groups()) == installed, (
        f"{versions()}: check each patch in rules/{ADAPT}, then update its versions"
    )


def test_a_workflow_takes_another_number_of_cores():
    resources = Resources({})
    resources["_cores"] = 7
    assert resources["_cores"].value == 7, (
        f"rules/{ADAPT} sets workflow.global_resources['_cores'] ({versions()})"
    )


def test_the_interval_grows_by_what_is_set():
    settings = SimpleNamespace(seconds_between_status_checks=10)
    executor = SimpleNamespace(
        _next_seconds_between_status_checks=None,
        workflow=SimpleNamespace(remote_execution_settings=settings),
    )
    assert STATUS_INTERVAL.fget(executor) == 10
    STATUS_INTERVAL.fset(executor, 180)
    assert STATUS_INTERVAL.fget(executor) == 180
