"""A training that is refused (exit code 2) is not started again; one that crashes is."""

from __future__ import annotations


def attempts(project) -> int:
    return len(list((project.folder / "results/demo/logs/train_model").glob("*.log")))


def test_what_is_refused_is_tried_once_and_what_crashes_again(make_project, repo_root, monkeypatch):
    project = make_project("refused")
    marker = project.folder / "results/demo/logs/train_model.refused"
    project.configure(train={"global_batch": 100_000, "max_steps": None})
    refused = project.run("train", check=False)
    assert refused.returncode != 0 and "does not fill one optimizer step" in refused.stderr
    assert "Trying to restart" not in refused.stdout + refused.stderr
    assert attempts(project) == 1 and "does not fill" in marker.read_text()

    # The user changes something: the next attempt starts without the marker, and a crash is tried again. After two
    # crashes at the same step the guard refuses, which is not tried again either.
    project.configure(train={"global_batch": None, "max_steps": 6})
    project.run("results/demo/train_config.py")
    text = (project.folder / "results/demo/train_config.py").read_text(encoding="utf-8")
    text = text.replace("from torch.optim", "from train_hooks import RaiseAt\nfrom torch.optim")
    own = project.folder / "own.py"
    own.write_text(text.replace("custom_hooks = []", "custom_hooks = [dict(type=RaiseAt)]"), encoding="utf-8")
    project.configure(train={"config": str(own)})
    monkeypatch.setenv("PYTHONPATH", str(repo_root / "tests"))
    monkeypatch.setenv("TEST_RAISE", "1")
    crashed = project.run("train", check=False)
    assert crashed.returncode != 0
    output = crashed.stdout + crashed.stderr
    assert output.count("Trying to restart") == 2 and attempts(project) == 1 + 3
    assert "the last 2 attempts all ended after step 0" in marker.read_text()
