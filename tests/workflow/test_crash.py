"""A crash in the middle costs nothing but time: the same weights come out as without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time


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
    done = finished.run("results/demo/train.json")
    assert "Finished before" in done.stdout + done.stderr
    assert manifest.read_bytes() == before
    assert finished.planned() == {}
