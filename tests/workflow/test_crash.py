"""A crash in the middle costs nothing but time: the same weights come out as without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from kept import kept


def losses(project):
    train = json.loads((project.folder / "results" / "demo" / "train.json").read_text())
    metrics = project.folder / "results" / "demo" / train["run_folder"] / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"]) for line in lines], train


def test_everything_killed_during_training_and_started_again(finished, make_project):
    project = make_project("crash")
    running = subprocess.Popen(
        project.command("train"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=project.code,
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and running.poll() is None:
        saved = list(project.folder.glob("results/demo/checkpoints/*/iter_*.pth"))
        if saved:
            break
        time.sleep(0.05)
    assert running.poll() is None, "the training was over before it could be killed"
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert saved
    assert not (project.folder / "results" / "demo" / "train.json").exists()

    project.run("--unlock")
    project.run("train")
    again, manifest = losses(project)
    undisturbed, expected = losses(finished)
    assert again == undisturbed
    assert manifest["weights_sha256"] == expected["weights_sha256"]
    attempts = project.folder / "results" / "demo" / manifest["run_folder"] / "metrics.jsonl"
    assert {json.loads(line)["attempt"] for line in attempts.read_text().splitlines()} == {1, 2}


def test_a_finished_training_is_not_repeated(finished):
    manifest = finished.folder / "results" / "demo" / "train.json"
    before = manifest.read_bytes()
    manifest.unlink()
    with kept(finished.folder / "results" / "benchmarks" / "train_model" / "demo.tsv"):
        done = finished.run("results/demo/train.json")
    assert "Finished before" in done.stdout + done.stderr
    assert manifest.read_bytes() == before
    assert finished.planned() == {}


def test_a_training_that_is_told_to_stop_goes_on_by_itself(finished, make_project):
    """As when a cluster takes its node back: it saves and ends with code 75, and Snakemake starts it again."""
    project = make_project("stopped")
    running = subprocess.Popen(
        project.command("train"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=project.code,
    )
    trainer = None
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and running.poll() is None and trainer is None:
        if list(project.folder.glob("results/demo/checkpoints/*/iter_*.pth")):
            trainer = trainer_of(project)
        time.sleep(0.02)
    assert trainer is not None, "the training was over before it could be stopped"
    os.kill(trainer, signal.SIGTERM)
    output = running.communicate(timeout=600)[0]
    assert running.returncode == 0, output[-6000:]
    assert "(SIGTERM); start again to go on" in output and "Trying to restart" in output
    again, manifest = losses(project)
    undisturbed, expected = losses(finished)
    assert again == undisturbed
    assert manifest["weights_sha256"] == expected["weights_sha256"]


def trainer_of(project) -> int | None:
    """The process of train_model.py, and not the shell that started it."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        names = {Path(word.decode(errors="replace")).name for word in words[:2]}
        if "train_model.py" in names and os.readlink(file.with_name("cwd")) == str(project.folder):
            return int(file.parent.name)
    return None
