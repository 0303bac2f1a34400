"""What clusters do to jobs: however a training is disturbed, it ends with the weights and losses of one that was not."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import pytest
from drill_project import PATIENCE, STEPS, wait_until

from pods import exit_codes, start_pods

pytestmark = pytest.mark.timeout(900)  # the first test waits for the cluster and what all trainings share


@pytest.fixture(scope="session")
def whole(project):
    """What a training on one node comes to when nothing happens to it."""
    return train_undisturbed(project, "whole")


@pytest.fixture(scope="session")
def whole_2(project):
    """Likewise on two nodes."""
    return train_undisturbed(project, "whole_2")


@pytest.fixture(scope="session")
def time_limited(project):
    """A training of more than two minutes in jobs of two, under way while the first drills run."""
    with project.training("walltime", slow=10) as running:
        yield running


def train_undisturbed(project, run):
    with project.training(run, slow=0):
        pass
    result = project.result(run)
    assert len(result[1]) == STEPS and len(project.attempts(run)) == 1
    return result


def continued_from(log: str) -> int:
    """The step after which an attempt went on."""
    return int(re.search(r"after step (\d+) \(attempt", log)[1])


def test_two_nodes_train_as_two_ranks_here(project, time_limited, whole_2):
    command = project.command("--cores", 1, project.manifest("local"))  # as many threads for a rank
    environment = {**os.environ, "PYTHONPATH": str(project.code / "tests"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, cwd=project.code, check=True, capture_output=True)
    assert project.result("local") == whole_2


def test_two_pods_train_as_two_nodes(project, whole_2):
    """The same training without Slurm, as launch_dlc.py starts it."""
    folder = project.folder / "results" / "pods"
    folder.mkdir()
    command = ["train_model.py", project.folder / "results/whole_2/train_config.py"]
    command += ["--runs-dir", folder / "checkpoints", "--manifest", folder / "train.json"]
    own = {"PYTHONPATH": project.code / "tests", "TEST_SLOW": 0}
    pods = start_pods(folder / "pods.log", *command, cwd=project.folder, **own)
    assert exit_codes(pods) == [0, 0], (folder / "pods.log").read_text()[-3000:]
    assert project.result("pods") == whole_2


def test_a_rank_is_killed(project, whole_2):
    with project.training("rank") as running:
        project.wait_for_step(running, "rank", 4)
        os.kill(project.ranks("rank")[-1], signal.SIGKILL)
    assert project.result("rank") == whole_2
    first, second = project.attempts("rank")
    assert "Killed" in first and continued_from(second) == 3
    log = re.search(r"Last 20 of \d+ lines of (results/rank/logs/train_model/\S+\.log):\n", project.said())
    assert (project.folder / log[1]).read_text() == first
    assert project.said()[log.end() :].startswith(
        "".join(f"    {line}\n" for line in first.splitlines()[-20:])
    )


def test_a_cancelled_job_is_submitted_again(project, whole):
    with project.training("scancel") as running:
        project.wait_for_step(running, "scancel", 4)
        project.cluster.run("scancel", project.job("scancel"))
    assert project.result("scancel") == whole
    first, second = project.attempts("scancel")
    assert "CANCELLED" in first and continued_from(second) >= 3


def test_the_time_limit_costs_no_step(project, time_limited, whole):
    assert time_limited.wait(timeout=PATIENCE) == 0, project.said()[-6000:]
    assert project.result("walltime") == whole
    attempts = project.attempts("walltime")
    stopped = re.search(r"Stopped after step (\d+) of 12 \(the time limit is near\)", attempts[0])
    assert continued_from(attempts[1]) == int(stopped[1])
    ended, submitted = project.times("walltime")
    assert 0 <= (submitted - ended).total_seconds() < 30, "Slurm is asked every 20 seconds"


def preempt(project) -> None:
    project.cluster.run(
        "sbatch", "-p", "urgent", "--nodes=4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2"
    )


def wait_for_requeued(project, run: str, job: str) -> None:
    """Waits for the second attempt, under the job's number, and spares it the time that Slurm makes it wait."""

    def runs() -> bool:
        project.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        return len(project.attempt_jobs(run)) == 2

    wait_until(runs, f"second attempt of {run}", PATIENCE)
    assert project.attempt_jobs(run) == [job, job]


def test_a_preempted_job_goes_on_under_its_number(project, whole):
    with project.training("preempted") as running:
        project.wait_for_step(running, "preempted", 4)
        job = project.job("preempted")
        preempt(project)
        wait_for_requeued(project, "preempted", job)
    assert project.result("preempted") == whole
    assert continued_from(project.attempts("preempted")[1]) >= 3


def test_a_preempted_job_that_is_not_requeued_is_submitted_again(project, whole):
    with project.training("not_requeued") as running:
        project.wait_for_step(running, "not_requeued", 4)
        project.cluster.run("scontrol", "update", f"JobId={project.job('not_requeued')}", "Requeue=0")
        preempt(project)
    assert project.result("not_requeued") == whole
    assert continued_from(project.attempts("not_requeued")[1]) >= 3


def test_a_node_goes_down(project, whole):
    with project.training("node") as running:
        project.wait_for_step(running, "node", 4)
        job = project.job("node")
        node = project.cluster.run("squeue", "-h", "-j", job, "-o", "%N").stdout.strip()
        project.cluster.fail_node(node, job)
        wait_for_requeued(project, "node", job)
    assert project.result("node") == whole
    assert continued_from(project.attempts("node")[1]) == 3
    project.cluster.start_node(node)
    project.cluster.wait_until_idle()


def test_slurmctld_is_restarted(project, whole):
    with project.training("slurmctld", slow=1) as running:
        project.wait_for_step(running, "slurmctld", 3)
        project.cluster.stop_slurmctld()
        project.wait_for_step(running, "slurmctld", 6)
        project.cluster.start_slurmctld()
    assert project.result("slurmctld") == whole
    assert len(project.attempts("slurmctld")) == 1


def test_snakemake_is_killed_and_started_again(project, whole):
    running = project.start(project.manifest("controller"), slow=3)
    project.wait_for_step(running, "controller", 3)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    subprocess.run(project.command("--unlock"), cwd=project.code, check=True, capture_output=True)
    with project.training("controller"):
        pass
    assert project.result("controller") == whole
    first, second = project.attempts("controller")
    assert "Another trainer works in" in second and "Finished before" in second
    assert {line["attempt"] for line in project.metrics("controller")} == {1}


def test_two_at_once(project, whole):
    other = project.start("--nolock", project.manifest("twice"))
    with project.training("twice", "--nolock"):
        assert other.wait(timeout=PATIENCE) == 0, project.said()[-6000:]
    assert project.result("twice") == whole
    assert {line["attempt"] for line in project.metrics("twice")} == {1}
    assert sum("Another trainer works" in log for log in project.attempts("twice")) == 1


def test_the_disk_is_full_while_saving(project, whole):
    folder = project.folder / "results/disk/checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        filler = folder / "filler"
        filler.write_bytes(bytes(3_600_000))
        with project.training("disk") as running:
            wait_until(
                lambda: any("No space left" in log for log in project.attempts("disk")), "full disk", 300
            )
            assert running.poll() is None
            filler.unlink()
        assert project.result("disk") == whole
        assert len(project.attempts("disk")) == 2
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
