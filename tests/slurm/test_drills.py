"""What clusters do to jobs: however a training is disturbed, it ends with the weights and losses of one that was not.

What happens to each run is in drills.py. `whole` is the training on one node that nothing interrupts, while Snakemake and
slurmctld go and come; `local` has two ranks, on this machine and without Slurm.
"""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from drills import WAITING

from pods import exit_codes, start_pods

pytestmark = pytest.mark.timeout(
    2400
)  # the first test waits for the cluster, and for all drills to be under way


def continued_from(log: str) -> int:
    """The step after which an attempt went on."""
    return int(re.search(r"after step (\d+) \(attempt", log)[1])


def test_two_pods_train_as_two_ranks_here(project, local):
    """Without Slurm, as launch_dlc.py starts them."""
    folder = project.folder / "results" / "pods"
    folder.mkdir()
    command = ["train_model.py", project.folder / "results/local/train_config.py"]
    command += ["--runs-dir", folder / "checkpoints", "--manifest", folder / "train.json"]
    own = {"PYTHONPATH": project.code / "tests"}
    pods = start_pods(folder / "pods.log", *command, cwd=project.folder, **own)
    assert exit_codes(pods) == [0, 0], (folder / "pods.log").read_text()[-3000:]
    assert project.result("pods") == local


def test_two_nodes_train_as_two_ranks_here(rank, local):
    assert rank == local


def test_a_rank_is_killed(project, shared, rank):
    first, second = project.attempts("rank")
    assert "was killed by signal 9" in first and continued_from(second) == 3
    log = re.search(r"Last 20 of \d+ lines of (results/rank/logs/train_model/\S+\.log):\n", shared.said())
    assert (project.folder / log[1]).read_text() == first
    assert shared.said()[log.end() :].startswith(
        "".join(f"    {line}\n" for line in first.splitlines()[-20:])
    )


def test_two_calls_train_one_run_while_slurmctld_and_snakemake_go_and_come(project, whole):
    assert {line["attempt"] for line in project.metrics("whole")} == {1}
    logs = project.attempts("whole")
    assert len(logs) >= 3 and sum("Training 12 steps" in log for log in logs) == 1
    assert any(WAITING in log and "Already finished" in log for log in logs)


def test_the_disk_is_full_while_saving(project, full_disk, resubmitted, whole):
    assert resubmitted == whole
    first, second = project.attempts("resubmitted")[:2]
    assert "No space left" in first and "No space left" not in second


def test_a_job_that_is_cancelled_or_preempted_for_good_is_submitted_again(project, resubmitted, whole):
    assert resubmitted == whole
    cancelled, second, third = project.attempts("resubmitted")[-3:]
    assert "CANCELLED" in cancelled and 3 <= continued_from(second) <= 5
    assert 6 <= continued_from(third) <= 8
    jobs = project.attempt_jobs("resubmitted")
    assert len(set(jobs)) == len(jobs)


def test_a_job_that_is_preempted_or_loses_its_node_goes_on_under_its_number(project, requeued, whole):
    assert requeued == whole
    _, second, third = project.attempts("requeued")
    assert 3 <= continued_from(second) <= 5
    assert continued_from(third) == 6
    assert len(set(project.attempt_jobs("requeued"))) == 1


def test_the_time_limit_costs_no_step(project, walltime, whole):
    assert walltime == whole
    stopped = None
    for log in project.attempts("walltime"):
        if stopped is not None and "(attempt" in log:
            assert continued_from(log) == stopped
            break
        found = re.search(r"Stopped after step (\d+) of 12 \(the time limit is near\)", log)
        stopped = int(found[1]) if found else stopped
    else:
        pytest.fail("no attempt went on after the time limit of one")


def test_slurm_is_asked_every_20_seconds(project, walltime):
    """With the profile as shipped. The plugin itself would wait 15, 25, 35, ... seconds while no job ends."""
    looks = [float(line) for line in (project.folder / "looks.txt").read_text().split()]
    pauses = [second - first for first, second in pairwise(looks)]
    assert 19 < min(pauses[2:5]) < 30, pauses


def test_a_training_that_is_refused_is_one_attempt_and_one_job(project, refused):
    """Refused by a rank, with exit code 2, of which Slurm and Snakemake only see that the job failed."""
    said = (project.folder / "refused.log").read_text()
    assert refused is None and "error: the data does not fill one optimizer step" in said
    assert "Trying to restart" not in said
    (attempt,) = project.attempts("refused")
    assert "does not fill one optimizer step" in attempt and "Traceback" not in attempt
    jobs = project.cluster.run("squeue", "-h", "-t", "all", "-o", "%i %k").stdout.splitlines()
    own = [job for job in map(str.split, jobs) if job[1:] == ["rule_train_model_wildcards_refused"]]
    assert [job[0] for job in own] == project.attempt_jobs("refused")


def test_trainings_of_one_call_run_side_by_side(project, shared, whole, resubmitted):
    shared.end_well()
    first, other = (
        project.times(next(job for job in shared.jobs() if job in project.attempt_jobs(run)))
        for run in ("whole", "resubmitted")
    )
    assert max(first[0], other[0]) < min(first[1], other[1])
