"""A crash costs only time: the weights are the same as without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kept import kept
from snaketune.training.metrics_file import whole_lines


def metrics(project) -> list[dict]:
    """Returns the metrics of every attempt's steps."""
    files = project.folder.glob("results/demo/checkpoints/*/metrics.jsonl")
    return [values for file in files for _, values in whole_lines(file)]


def losses(project):
    train = json.loads((project.folder / "results" / "demo" / "train.json").read_text())
    return [(line["step"], line["loss"], line["lr"]) for line in metrics(project)], train


def test_a_training_killed_with_everything_and_then_told_to_stop(finished, tokenised, repo_root, monkeypatch):
    """As in a power failure, then as in a preemption: training saves, exits with 75 and is restarted."""
    project = tokenised("crash")
    results = project.folder / "results" / "demo"
    go_on = project.folder / "go_on"
    monkeypatch.setenv("PYTHONPATH", str(repo_root / "tests"))
    monkeypatch.setenv("TEST_STAND_STILL", f"4:{go_on}")
    project.stand_still()

    with training(project) as running:
        trainer_at(project, running, attempt=1, step=3)
    assert list(results.glob("checkpoints/*/iter_2.pth")) and not (results / "train.json").exists()

    project.run("--unlock")
    with training(project) as running:
        os.kill(trainer_at(project, running, attempt=2, step=3), signal.SIGTERM)
        go_on.touch()
        output = running.communicate(timeout=600)[0]
    assert running.returncode == 0, output[-6000:]
    assert "(SIGTERM); start again to resume" in output and "Trying to restart" in output

    again, manifest = losses(project)
    undisturbed, expected = losses(finished)
    assert again == undisturbed
    assert manifest["weights_sha256"] == expected["weights_sha256"]
    assert {line["attempt"] for line in metrics(project)} == {1, 2, 3}


def test_a_finished_training_is_not_repeated(finished):
    manifest = finished.folder / "results" / "demo" / "train.json"
    before = manifest.read_bytes()
    manifest.unlink()
    with kept(finished.folder / "results" / "benchmarks" / "train_model" / "demo.tsv"):
        done = finished.run("results/demo/train.json")
    assert "Already finished" in done.stdout + done.stderr
    assert manifest.read_bytes() == before
    assert finished.planned() == {}


@contextmanager
def training(project) -> Iterator[subprocess.Popen]:
    """Runs `snakemake train` in a separate process group; kills the rest of the group after the block."""
    running = subprocess.Popen(
        project.command("train"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=project.code,
    )
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()


def trainer_at(project, running, attempt: int, step: int) -> int:
    """Waits for the metrics of a step; returns the id of the training process."""
    deadline = time.monotonic() + 600
    while [(line["attempt"], line["step"]) for line in metrics(project)[-1:]] != [(attempt, step)]:
        time.sleep(0.05)
        assert running.poll() is None and time.monotonic() < deadline, f"no step {step} in attempt {attempt}"
    return trainer_of(project)


def trainer_of(project) -> int | None:
    """Returns the process id of train_model.py, not of the shell that started it."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        names = {Path(word.decode(errors="replace")).name for word in words[:2]}
        if "train_model.py" in names and os.readlink(file.with_name("cwd")) == str(project.folder):
            return int(file.parent.name)
    return None
