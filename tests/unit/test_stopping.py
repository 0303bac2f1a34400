"""Stopping early, forwarding signals to ranks, and refusing another attempt after repeated crashes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from snaketune.common.cli import UserError
from snaketune.training.crash_guard import begin_attempt, check_guard, clear_guard, record_crash
from snaketune.training.early_stop import StopRequest
from snaketune.training.launch import free_port


@pytest.fixture
def one_rank(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Clock:
    """Replaces the module `time`."""

    def __init__(self):
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.mark.parametrize(("step", "save"), [(1.0, 2.0), (30.0, 100.0), (0.1, 600.0)])
def test_a_run_stops_in_time_for_the_save_and_not_much_before(one_rank, monkeypatch, step, save):
    clock = Clock()
    monkeypatch.setattr("snaketune.training.early_stop.time", clock)
    monkeypatch.delenv("SNAKETUNE_STARTED", raising=False)
    limit = 60.0  # minutes
    stop = StopRequest(limit)
    stop.saved(save)
    while not stop.agree(torch.device("cpu")):
        clock.now += step
        assert clock.now < 1000 + 60 * limit, "it never stopped"
    spare = 1000 + 60 * limit - (clock.now + save)
    assert 60 <= spare <= 60 + 2 * step + 0.5 * save
    assert stop.reason == "the time limit is near"


def test_the_clock_starts_with_the_job_not_with_the_trainer(one_rank, monkeypatch):
    monkeypatch.setenv("SNAKETUNE_STARTED", str(time.time() - 590))
    stop = StopRequest(10)
    assert stop.agree(torch.device("cpu"))
    assert not StopRequest(30).agree(torch.device("cpu"))
    assert not StopRequest(None).agree(torch.device("cpu"))


_RANK = """
import os, pathlib, signal, sys, time
from snaketune.training.early_stop import StopRequest
stop = StopRequest()
stop.listen()
folder = pathlib.Path(sys.argv[1])
(folder / ("ready" + os.environ["RANK"])).touch()
while stop.signal is None:
    time.sleep(0.01)
time.sleep(1.5 * int(os.environ["RANK"]))  # saving takes longer on rank 1
(folder / ("saved" + os.environ["RANK"])).write_text(signal.Signals(stop.signal).name)
sys.exit(75)
"""
RANKS = Path(__file__).parents[1] / "ranks.py"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_all_ranks_and_none_is_ended_while_it_saves(tmp_path, repo_root, number):
    (tmp_path / "rank.py").write_text(_RANK)
    command = [sys.executable, str(RANKS), "2", str(tmp_path / "rank.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(repo_root / "workflow_scripts")}
    launcher = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) == 75
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == [number.name] * 2


def attempt(folder, start: int, end: int, error: Exception | None = None) -> None:
    """Simulates an attempt that resumes after step `start` and crashes after step `end`."""
    metrics = folder / "metrics.jsonl"
    check_guard(folder, metrics)
    begin_attempt(folder, metrics, start)
    metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, end + 1)) + '{"st')
    if error is not None:
        try:
            raise error
        except RuntimeError as caught:
            record_crash(folder, caught)


def test_guard(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    metrics = tmp_path / "metrics.jsonl"
    error = RuntimeError("out of range")
    attempt(tmp_path, 0, 7, error)
    attempt(tmp_path, 5, 9, error)  # got further than the last attempt
    attempt(tmp_path, 5, 9, error)
    with pytest.raises(UserError, match="the last 2 attempts all ended after step 9(.|\n)*out of range"):
        check_guard(tmp_path, metrics)
    clear_guard(tmp_path)
    # Killed from outside three times at one step; a crash at a different step in between resets the count.
    for end in (6, 6, 8, 6, 6):
        attempt(tmp_path, 5, end)
    attempt(tmp_path, 5, 6)
    with pytest.raises(
        UserError, match="the last 3 attempts all ended after step 6(.|\n)*killed from outside"
    ):
        check_guard(tmp_path, metrics)
    clear_guard(tmp_path)
    for _ in range(3):  # no steps done
        attempt(tmp_path, 5, 0)
    with pytest.raises(UserError, match="after step 5"):
        check_guard(tmp_path, metrics)


_LOSES_A_RANK = """
import os, sys
from pathlib import Path
import torch
from torch import distributed
from snaketune.training.launch import free_port
from snaketune.training.crash_guard import record_crash

distributed.init_process_group("gloo")
if os.environ["RANK"] == "1":
    os._exit(9)
try:
    distributed.all_reduce(torch.ones(4))
except RuntimeError as error:
    record_crash(Path(sys.argv[1]), error)
    sys.exit(3)
"""


@pytest.mark.slow
def test_a_rank_that_only_misses_another_names_no_cause(tmp_path, repo_root):
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own["PYTHONPATH"] = str(repo_root / "workflow_scripts")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _LOSES_A_RANK, str(tmp_path)], env={**os.environ, **own, "RANK": rank}
        )
        for rank in "01"
    ]
    assert [rank.wait(timeout=60) for rank in ranks] == [3, 9]
    assert list(tmp_path.iterdir()) == []
