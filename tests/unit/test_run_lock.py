"""The lock of a run folder: one trainer at a time, and nobody waits for a stale lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from snaketune.training.early_stop import EXIT_RESUME
from snaketune.training.run_lock import LOCK, STALE, LockTaken, RunLock, is_alive, read_owner, wait_until_free

HOLD = "import sys, time; from pathlib import Path; from snaketune.training.run_lock import RunLock; lock = RunLock(Path(sys.argv[1]))"


@pytest.fixture
def holder(tmp_path, repo_root):
    """Another process that takes the lock of tmp_path until it is killed."""
    environment = {**os.environ, "PYTHONPATH": str(repo_root / "workflow_scripts"), "SLURM_JOB_ID": "41"}
    command = [sys.executable, "-c", f"{HOLD}; print('taken', flush=True); time.sleep(100)", str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.wait()


def leave_lock(folder, age: float, job: str | None = None) -> dict:
    """Writes the lock of a trainer on another host, with its last heartbeat `age` seconds ago."""
    owner = {"user": "me", "slurm_job": job, "token": "theirs", "since": "2026-01-01T00:00:00Z"}
    owner |= {"host": "other-host", "boot": "b", "pid": 1, "started": "2"}
    (folder / LOCK).write_text(json.dumps(owner))
    os.utime(folder / LOCK, (time.time() - age,) * 2)
    return owner


def test_one_trainer_at_a_time_and_the_next_after_a_kill(tmp_path, holder):
    with pytest.raises(LockTaken, match=f"process {holder.pid} of .*, Slurm job 41, since 20"):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    lock = RunLock(tmp_path)
    assert read_owner(tmp_path)["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_with_the_other_trainer_or_with_the_time(tmp_path, holder, capfd):
    with pytest.raises(SystemExit) as ended:
        wait_until_free(tmp_path, time.time())
    assert ended.value.code == EXIT_RESUME
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    assert wait_until_free(tmp_path, float("inf"))
    killer.wait()
    assert not wait_until_free(tmp_path, float("inf"))
    assert "Another trainer is running in" in capfd.readouterr().out


def test_without_slurm_a_trainer_elsewhere_lives_while_it_gives_signs_of_life(tmp_path):
    owner = leave_lock(tmp_path, age=STALE / 2)
    assert is_alive(tmp_path, owner)
    with pytest.raises(LockTaken, match="other-host"):
        RunLock(tmp_path)
    leave_lock(tmp_path, age=STALE + 5)
    RunLock(tmp_path).release()


@pytest.mark.parametrize(
    ("state", "age", "alive"),
    [
        ("RUNNING", STALE + 5, True),  # suspended, or the file server hangs
        ("SUSPENDED", STALE + 5, True),
        ("CANCELLED", 1, False),
        ("NODE_FAIL", 1, True),  # the node may only be unreachable
        ("NODE_FAIL", STALE + 5, False),
        ("", 1, True),  # Slurm no longer knows the job
    ],
)
def test_slurm_says_whether_the_job_of_a_trainer_elsewhere_runs(tmp_path, monkeypatch, state, age, alive):
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f'#!/bin/sh\n[ "$3" = 17 ] && echo {state}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert is_alive(tmp_path, leave_lock(tmp_path, age, job="17")) is alive


def test_a_requeued_job_takes_over_its_own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    leave_lock(tmp_path, age=STALE + 5, job="17")
    RunLock(tmp_path).release()
