"""Checkpoints are evaluated during training; after a kill and a restart, none is evaluated twice."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from browser import cells, open_browser
from snaketune.common.files import read_json

STEPS = [3, 6]
LAST = 8


@pytest.fixture(scope="module")
def followed(tokenised, repo_root):
    """A project whose training was killed once its first checkpoint was evaluated, and resumed on one core.

    It saves at even steps, so step 3, of which only the weights were pinned, is trained again.
    """
    project = tokenised("followed", "evaluation/base.json")
    project.configure(
        train={"max_steps": LAST, "save_steps": 2, "lr": 0.3},
        evaluate={"checkpoints": "every 3"},
        **dict.fromkeys(("turbomind", "parity", "tool_calls"), {"enabled": False}),
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(repo_root / "tests"))
        project.stand_still()
        environment.setenv("TEST_STAND_STILL", f"4:{project.folder / 'never'}")
        first = kill_when_evaluated(project)
        environment.delenv("TEST_STAND_STILL")
        project.run("--unlock")
        project.run("--cores", 1)
    return project, project.folder / "results" / "demo", first


def kill_when_evaluated(project):
    """Runs the main job and kills it once a checkpoint is evaluated; returns {file: (bytes, mtime)}."""
    running = subprocess.Popen(
        project.command(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=project.code,
    )
    deadline = time.monotonic() + 600
    found = []
    try:
        while time.monotonic() < deadline and running.poll() is None and not found:
            found = list(project.folder.glob("results/demo/evaluation/checkpoints/*/*iter_3.json"))
            time.sleep(0.2)
        alive = running.poll() is None
        trained = (project.folder / "results" / "demo" / "train.json").exists()
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert alive and found and not trained, "step 3 is evaluated while training goes on"
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_a_finished_evaluation_is_not_repeated(followed):
    project, _, first = followed
    for path, (data, time_ns) in first.items():
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (data, time_ns)
    assert project.planned() == {}


def test_the_curve_is_that_of_the_evaluations_and_best_is_linked(followed):
    _, run, _ = followed
    curve = read_json(run / "evaluation" / "checkpoints.json")
    (folder,) = (run / "evaluation" / "checkpoints").iterdir()
    files = [
        run / "evaluation/base.json",
        *(folder / f"iter_{step}.json" for step in STEPS),
        run / "evaluation/tuned.json",
    ]
    losses = [read_json(path)["loss"] for path in files]
    assert [point["step"] for point in curve["points"]] == [0, *STEPS, LAST]
    assert [point["figures"]["loss"]["value"] for point in curve["points"]] == pytest.approx(
        losses, rel=1e-12
    )
    best = curve["points"][1 + losses[1:].index(min(losses[1:]))]
    assert curve["best"]["step"] == best["step"]
    assert (run / "best").is_symlink()
    expected = (
        run / "hf" if best["step"] == LAST else run / f"checkpoint_hf/{folder.name}/iter_{best['step']}"
    )
    assert (run / "best").resolve() == expected.resolve()
    assert read_json(run / "best" / "manifest.json")["checkpoint"] == f"iter_{best['step']}.pth"
    left = [path.name for path in run.glob("checkpoint_hf/*/*")]
    assert left == ([] if best["step"] == LAST else [expected.name]), "the other models are removed"
    held = run / "checkpoints" / folder.name / "held"
    assert not list(held.glob("*.pth")) and len(list(held.glob("iter_*.json"))) == len(STEPS)


def test_the_report_shows_them(followed, tmp_path):
    _, run, _ = followed
    points = read_json(run / "evaluation" / "checkpoints.json")["points"]
    with open_browser(tmp_path / "profile") as browser:
        browser.look(1200)
        browser.open(run / "report.html")
        rows = cells(browser, "#checkpoints-table tbody tr")
        assert (
            len(browser.evaluate("[...document.querySelectorAll('#checkpoints ~ figure')].map(f => 1)")) == 1
        )
    assert [row[1].split("\n")[0] for row in rows] == [f"{p['figures']['loss']['value']:.4f}" for p in points]


def test_the_lineage_of_a_checkpoints_score_reaches_the_conversations(followed, run_script):
    project, run, _ = followed
    (path,) = run.glob("evaluation/checkpoints/*/iter_3.json")
    tree = run_script("lineage.py", path).stdout
    assert "Hugging Face folder of iter_3" in tree and "JSONL file" in tree and "weights.pt" in tree
    assert (
        "evaluation, iter_6 model" in run_script("lineage.py", run / "evaluation" / "checkpoints.json").stdout
    )
    run_script("lineage.py", run / "best")
    verified = run_script("verify_results.py", project.folder / "results")
    assert "match" in verified.stdout
