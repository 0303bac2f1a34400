"""Checkpoints are evaluated while training goes on; killed and started again, nothing is evaluated twice."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from browser import cells, open_browser
from common.files import read_json

STEPS = [3, 6]
LAST = 8


@pytest.fixture(scope="module")
def followed(make_project, repo_root):
    """A project whose training was killed when its first checkpoint had been evaluated, and went on on one core.

    Its own config makes steps long, and saves at even steps.
    """
    project = make_project("followed")
    train = {"max_steps": LAST, "save_steps": 2, "lr": 0.02}
    project.configure(
        train=train,
        evaluate={"checkpoints": "every 3", "best_metric": "loss.call"},
        turbomind={"enabled": False},
    )
    rendered = project.folder / "results" / "demo" / "train_config.py"
    project.run("results/demo/train_config.py")
    text = rendered.read_text().replace("from torch.optim", "from train_hooks import Slow\nfrom torch.optim")
    own = project.folder / "own_config.py"
    own.write_text(text.replace("custom_hooks = []", "custom_hooks = [dict(type=Slow)]"))
    project.configure(train={"config": str(own)})
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(repo_root / "tests"))
        environment.setenv("TEST_SLOW", "12")
        first = kill_when_evaluated(project)
        environment.setenv("TEST_SLOW", "0")
        project.run("--unlock")
        project.run("--cores", 1)
    return project, project.folder / "results" / "demo", first


def kill_when_evaluated(project):
    """Runs the main job, kills everything when one checkpoint has been evaluated; returns that file, bytes and time."""
    running = subprocess.Popen(
        project.command(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=project.code,
    )
    deadline = time.monotonic() + 400
    found = []
    while time.monotonic() < deadline and running.poll() is None and not found:
        found = list(project.folder.glob("results/demo/evaluation/checkpoints/*/*iter_3.json"))
        time.sleep(0.2)
    alive = running.poll() is None
    trained = (project.folder / "results" / "demo" / "train.json").exists()
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
    assert [point["step"] for point in curve["points"]] == [0, *STEPS, LAST]
    (folder,) = (run / "evaluation" / "checkpoints").iterdir()
    labels = {0: "base", LAST: "tuned"}
    for point in curve["points"]:
        step = point["step"]
        where, name = (run / "evaluation", labels[step]) if step in labels else (folder, f"iter_{step}")
        evaluation, calls = read_json(where / f"{name}.json"), read_json(where / f"tool_calls.{name}.json")
        assert point["figures"]["loss"]["value"] == pytest.approx(evaluation["loss"], rel=1e-12)
        (loss,) = (r for r in calls["summary"] if r["scope"] == "all" and r["metric"] == "loss.call")
        assert point["figures"]["loss.call"]["value"] == loss["value"]
    best = min(curve["points"][1:], key=lambda point: point["figures"]["loss.call"]["value"])
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
            len(browser.evaluate("[...document.querySelectorAll('#checkpoints ~ figure')].map(f => 1)")) >= 2
        )
    assert [row[1].split("\n")[0] for row in rows] == [f"{p['figures']['loss']['value']:.4f}" for p in points]
