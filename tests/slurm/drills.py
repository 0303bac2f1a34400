"""What happens to the trainings of the drills. All drills run at once, a thread each, on trainings of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from drill_project import Call, SlurmProject

FILLER = "filler"  # file that a full disk is full of
WAITING = "Another trainer is running in"  # as a job says
LATER = "later"  # partition of OpenCompass's tasks, which the cluster does not have at first


@dataclass(frozen=True)
class Drill:
    """One drill.

    Attributes:
        happens: What is done while it runs; gets the project and the call of Snakemake that serves it.
        targets: What the call that serves most drills makes for this one.
        pace: How fast its run trains at first, see `train_hooks.Pace`.
    """

    happens: Callable[[SlurmProject, Call], None]
    targets: tuple[str, ...] = ()
    pace: dict[str, int] = field(default_factory=dict)


@contextmanager
def start_drills(project: SlurmProject, names: set[str]) -> Iterator[tuple[Call | None, dict[str, Future]]]:
    """Starts drills; yields the call that serves most of them, and a future of each one's end. None is left behind."""
    for name in names:
        if DRILLS[name].pace:
            project.pace(name, **DRILLS[name].pace)
    targets = sorted({target for name in names for target in DRILLS[name].targets})
    with ThreadPoolExecutor(len(DRILLS)) as pool:
        try:
            calls = {}
            if "walltime" in names:  # its two minutes shall not go by while it starts beside all the others
                calls["walltime"] = start_as_shipped(project)
                calls["walltime"].wait_until(lambda: project.attempts("walltime"), "training of walltime")
            shared = project.start("shared", *OPTIONS, "--", *targets) if targets else None
            ends = {
                name: pool.submit(run_drill, project, DRILLS[name], calls.get(name, shared)) for name in names
            }
            yield shared, ends
        finally:
            project.end()


def run_drill(project: SlurmProject, drill: Drill, call: Call) -> None:
    """Runs a drill to its end."""
    drill.happens(project, call)
    for target in drill.targets:
        if "/" in target:  # a file, not a rule's name
            call.wait_until((project.folder / target).exists, target)


def nothing(project: SlurmProject, call: Call) -> None:
    """Leaves what the call makes alone."""


def kill_a_rank(project: SlurmProject, call: Call) -> None:
    """Kills a rank; the others wait for one."""
    project.wait_for_step(call, "rank", 4)
    os.kill(project.ranks("rank")[-1], signal.SIGKILL)
    project.pace("rank")


def end_jobs_for_good(project: SlurmProject, call: Call) -> None:
    """Lets jobs end that are not queued again: with a full disk, where there is one, cancelled, and preempted."""
    run, attempt = "resubmitted", 1
    filler = project.folder / "results" / run / "checkpoints" / FILLER
    if filler.exists():
        call.wait_until(lambda: any("No space left" in log for log in project.attempts(run)), "full disk")
        filler.unlink()
        attempt = 2
    project.wait_for_step(call, run, 4, attempt)
    project.cluster.run("scancel", project.job(run))
    wait_for_attempt(project, call, run, attempt + 1)
    project.pace(run, hold_after=7)
    project.wait_for_step(call, run, 7, attempt + 1)
    project.cluster.run("scontrol", "update", f"JobId={project.job(run)}", "Requeue=0")
    preempt(project, run)
    wait_for_attempt(project, call, run, attempt + 2)
    project.pace(run)


def preempt_then_fail_the_node(project: SlurmProject, call: Call) -> None:
    """Has a job preempted, which is queued again, and lets its node go down after that."""
    run = "requeued"
    project.wait_for_step(call, run, 4)
    preempt(project, run)
    wait_for_attempt(project, call, run, 2)
    project.pace(run, hold_after=7)
    project.wait_for_step(call, run, 7, attempt=2)
    node = node_of(project, run)
    project.cluster.fail_node(node, project.job(run))
    wait_for_attempt(project, call, run, 3)
    project.pace(run)
    project.cluster.start_node(node)


def node_of(project: SlurmProject, run: str) -> str:
    """The node that a run, which has it to itself, trains on."""
    return project.cluster.run("squeue", "-h", "-j", project.job(run), "-o", "%N").stdout.strip()


def preempt(project: SlurmProject, run: str) -> None:
    """Submits a job that needs the run's node and comes first."""
    request = ["-p", "urgent", "--nodelist", node_of(project, run), "--mem=0"]
    project.cluster.run("sbatch", *request, "-o", "/dev/null", "--wrap", "sleep 2")


def wait_for_attempt(project: SlurmProject, call: Call, run: str, attempt: int) -> None:
    """Waits for an attempt, and spares a job that was queued again the minutes that Slurm makes it wait."""
    jobs = set(project.attempt_jobs(run))

    def there() -> bool:
        for job in jobs:
            project.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        time.sleep(1)
        return len(project.attempts(run)) >= attempt

    call.wait_until(there, f"attempt {attempt} of {run}")


def mount_full_disk(folder: Path) -> str | None:
    """Mounts a file system with little room left; returns why that is not possible here."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        return mounted.stderr.strip()
    (folder / FILLER).write_bytes(bytes(3_600_000))
    return None


def start_as_shipped(project: SlurmProject) -> Call:
    """Starts the training that takes longer than its job may, with the profile as it is shipped."""
    programs = project.folder / "watched"
    programs.mkdir()
    squeue = programs / "squeue"
    squeue.write_text(
        f'#!/bin/sh\ncase "$*" in *--name*) date +%s.%N >> {project.folder}/looks.txt;; esac\n'
        f'exec {project.cluster.folder}/bin/squeue "$@"\n'
    )
    squeue.chmod(0o755)
    target = project.manifest("walltime")
    return project.start("walltime", "--nolock", "--", target, site="no_site.yaml", programs=programs)


def reach_the_time_limit(project: SlurmProject, call: Call) -> None:
    """Lets the rest train fast when the first job has been stopped."""
    call.wait_until(
        lambda: re.search(r"Stopped after step \d+ of", "".join(project.attempts("walltime"))), "stop"
    )
    project.pace("walltime")
    call.end_well()


def restart_slurmctld_then_kill_snakemake(project: SlurmProject, call: Call) -> None:
    """Has a second call train a run. slurmctld is down for some steps; then that call is killed, and made again."""
    run, target = "whole", project.manifest("whole")
    killed = project.start("killed", "--", target)
    project.wait_for_step(killed, run, 3)
    killed.wait_until(lambda: WAITING in "".join(project.attempts(run)), "job that waits for the other")
    project.cluster.stop_slurmctld()
    project.pace(run, hold_after=6)
    project.wait_for_step(call, run, 6)
    project.cluster.start_slurmctld()
    killed.kill()
    project.run("--unlock")
    again = project.start("again", "--", target)
    again.wait_until(
        lambda: again.jobs() and WAITING in project.attempt_of(run, again.jobs()[0]), "job that waits"
    )
    project.pace(run)
    again.end_well()


def add_the_partition(project: SlurmProject, call: Call) -> None:
    """Adds the partition of OpenCompass's tasks when their first attempt has failed for want of it."""
    call.wait_until(lambda: "datasets have no score" in call.said(), "failed benchmarks")
    assert not (project.folder / BENCHMARKS).exists()
    project.cluster.run("scontrol", "create", f"PartitionName={LATER}", "Nodes=ALL", "State=UP")


def pass_preflight(project: SlurmProject, call: Call) -> None:
    """Waits for what preflight says."""
    call.wait_until(lambda: "preflight: pass" in call.said(), "pass of preflight")


def be_refused(project: SlurmProject, call: Call) -> None:
    """Makes a call of its own, for a training whose ranks refuse it; that call must end badly."""
    own = project.start("refused", "--nolock", "--", project.manifest("refused"))
    own.wait_until(lambda: own.process.poll() is not None, "end")
    assert own.process.returncode != 0, own.said()[-6000:]


# Of the call that serves most drills. A few jobs at a time, those first that are the first of many: all at once would take
# longer than its two minutes to start the training with a time limit.
OPTIONS = ["--nolock", "--keep-going", "--jobs", 4, "--set-threads", "convert_pth_to_hf=4", "--prioritize"]
OPTIONS += [f"results/{run}/train.json" for run in ("whole", "resubmitted", "requeued")]
HELD = {"hold_after": 4}
BENCHMARKS = "results/whole/evaluation/opencompass.json"
DRILLS = {
    "walltime": Drill(reach_the_time_limit, pace={"step_seconds": 10}),
    "whole": Drill(restart_slurmctld_then_kill_snakemake, ("results/whole/train.json",), {"hold_after": 3}),
    "resubmitted": Drill(end_jobs_for_good, ("results/resubmitted/train.json",), HELD),
    "requeued": Drill(preempt_then_fail_the_node, ("results/requeued/train.json",), HELD),
    "rank": Drill(kill_a_rank, ("results/rank/train.json",), HELD),
    "converted": Drill(nothing, ("results/whole/hf",)),
    "benchmarked": Drill(add_the_partition, (BENCHMARKS,)),
    "refused": Drill(be_refused),
    "preflight": Drill(pass_preflight, ("preflight",)),
}
