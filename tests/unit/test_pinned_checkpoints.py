"""Checkpoints pinned for evaluation: each step once despite kills, and none left over."""

from __future__ import annotations

import shutil
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch

from snaketune.checkpoints.checkpoint_folders import is_whole
from snaketune.checkpoints.pinned import PINNED, PinPolicy
from snaketune.common.files import read_json, write_json
from snaketune.reporting.checkpoint_curve import remove_pinned
from snaketune.training.checkpoint_hook import CheckpointHook
from snaketune.training.early_stop import StopRequest

TOTAL = 12
WEIGHTS = b"weights"


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with an empty `held/`."""
    folder = tmp_path / "checkpoints" / "0123456789ab"
    write_json(folder / "identity.json", {"identity": "0123456789ab" * 5})
    (folder / "train_config.py").write_text("model = dict()\n")
    (folder / PINNED).mkdir()
    return folder


def save(folder, step: int, data: bytes = WEIGHTS) -> None:
    """Writes a whole checkpoint."""
    pth = folder / f"iter_{step}.pth"
    pth.mkdir()
    (pth / "weights.pt").write_bytes(data)
    files = {"weights.pt": {"bytes": len(data), "sha256": sha256(data).hexdigest()}}
    write_json(pth / "COMPLETE.json", {"step": step, "total_steps": TOTAL, "files": files})


def evaluate(run_folder, step: int) -> None:
    """Removes a pinned checkpoint, as its evaluation does (rules/follow_checkpoints.smk)."""
    shutil.rmtree(run_folder / PINNED / f"iter_{step}.pth")


def names(run_folder) -> list[str]:
    return sorted(path.name for path in (run_folder / PINNED).glob("iter_*"))


@pytest.fixture
def evaluated(run_folder):
    """A run killed after step 7: saved 2, 4 and 6, pinned 3 and 6, both evaluated; then 6 was lost."""
    for folder, step in ((run_folder, 2), (run_folder / PINNED, 3), (run_folder, 4), (run_folder, 6)):
        save(folder, step)
    assert PinPolicy(3).open(run_folder, 6, TOTAL) == {9}
    assert names(run_folder) == ["iter_3.json", "iter_3.pth", "iter_6.json", "iter_6.pth"]
    evaluate(run_folder, 3)
    evaluate(run_folder, 6)
    shutil.rmtree(run_folder / "iter_6.pth")
    return run_folder


def test_a_step_that_is_trained_again_is_not_pinned_again(evaluated, tmp_path):
    assert PinPolicy(3, tmp_path / "training.json").open(evaluated, 2, TOTAL) == {9}
    assert names(evaluated) == ["iter_3.json", "iter_6.json"]
    assert read_json(tmp_path / "training.json")["steps"] == [3, 6, 9]


def test_the_hook_leaves_a_step_that_was_pinned_alone(evaluated):
    """Saving would fail, because there is no DeepSpeed engine."""
    model = torch.nn.Linear(2, 2)
    runner = SimpleNamespace(
        work_dir=str(evaluated),
        iter=2,
        max_iters=TOTAL,
        world_size=1,
        pins=PinPolicy(3),
        model=SimpleNamespace(model=SimpleNamespace(module=model)),
        stop=StopRequest(None),
        train_loop=SimpleNamespace(skipped=SimpleNamespace(in_a_row=0)),
    )
    hook = CheckpointHook(interval=4)
    hook.before_train(runner)
    assert hook.to_pin == {9}
    for step in (3, 6):
        hook.after_train_iter(runner, step - 1)
    assert names(evaluated) == ["iter_3.json", "iter_6.json"]


@pytest.mark.parametrize("kind", ["links", "weights alone"])
def test_a_kill_before_the_record_is_made_good(run_folder, kind):
    save(run_folder if kind == "links" else run_folder / PINNED, 3)
    if kind == "links":
        shutil.copytree(run_folder / "iter_3.pth", run_folder / PINNED / "iter_3.pth")
    assert PinPolicy(3).open(run_folder, 2, TOTAL) == {6, 9}
    assert names(run_folder) == ["iter_3.json", "iter_3.pth"]
    assert read_json(run_folder / PINNED / "iter_3.json")["files"]["weights.pt"]["bytes"] == len(WEIGHTS)
    assert read_json(run_folder / PINNED / "identity.json") == read_json(run_folder / "identity.json")


def test_what_is_not_whole_counts_as_not_pinned(run_folder):
    for step in (3, 6, 9):
        save(run_folder / PINNED, step)
        (run_folder / PINNED / f"iter_{step}.pth" / "weights.pt").write_bytes(WEIGHTS[:-1])
    (run_folder / PINNED / "iter_3.pth" / "COMPLETE.json").unlink()
    save(run_folder, 6)
    assert PinPolicy(3).open(run_folder, 6, TOTAL) == {9}
    assert names(run_folder) == ["iter_6.json", "iter_6.pth", "iter_9.pth"]
    assert is_whole(run_folder / PINNED / "iter_6.pth")


def test_what_is_trained_and_gone_is_not_promised(run_folder, tmp_path):
    save(run_folder, 6)
    assert PinPolicy(3, tmp_path / "training.json").open(run_folder, 7, TOTAL) == {9}
    assert read_json(tmp_path / "training.json")["steps"] == [6, 9]
    assert PinPolicy().open(run_folder, 7, TOTAL) == set()


def test_what_other_settings_pinned_is_removed_at_the_end(evaluated, tmp_path):
    save(evaluated, 10)
    PinPolicy(10).open(evaluated, 10, TOTAL)
    remove_pinned(evaluated)
    assert names(evaluated) == ["iter_3.json", "iter_6.json"]
    assert is_whole(evaluated / "iter_10.pth"), "hard links: training keeps its own copy"
