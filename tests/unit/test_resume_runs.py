"""Interrupts runs of two ranks in different ways and starts them again."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch

import tiny_run
from snaketune.checkpoints.checkpoint_content import read_state_dict
from snaketune.checkpoints.checkpoint_folders import list_checkpoints
from tiny_run import curve, metrics, train, weights_sha256

pytestmark = pytest.mark.slow

STEPS = 20
FLAGS = ("--max-steps", STEPS, "--save-steps", 4, "--save-total-limit", 3, "--lr", 5e-3, "--global-batch", 4)
HOOKS = "RaiseAt, PoisonWeight"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_run.make_world(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def config(world):
    return tiny_run.render(world, "config.py", *FLAGS, hooks=HOOKS)


@pytest.fixture(scope="module")
def whole(world, config):
    """The run folder of an uninterrupted run."""
    train(config, world / "whole")
    return world / "whole"


def stop(config, work_dir, number: int, step: int, **options) -> int:
    """Starts a run and signals it after `step`; it must save and exit with 75. Returns the last step."""
    running = tiny_run.start(config, work_dir, **options)
    tiny_run.wait_for_step(running, work_dir, step)
    running.send_signal(number)
    assert running.wait(timeout=120) == 75, tiny_run.log(work_dir)[-3000:]
    last = metrics(work_dir)[-1]["step"]
    assert step <= last < STEPS
    assert list_checkpoints(work_dir)[-1].name == f"iter_{last}.pth", "saved right after the current step"
    return last


def test_limit_signals_and_a_flipped_bit_change_nothing(world, config, whole):
    folder, began = world / "stopped", time.monotonic()
    said = train(config, folder, "--time-limit", 0.001, code=75, warm=False)
    assert "Stopped after step 1 of 20 (the time limit is near)" in said
    assert [path.name for path in list_checkpoints(folder)] == ["iter_1.pth"]
    stop(config, folder, signal.SIGTERM, 3)
    last = stop(config, folder, signal.SIGUSR1, 6)
    assert (folder / "latest").read_text() == f"iter_{last}.pth\n"

    file = folder / f"iter_{last}.pth" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = list_checkpoints(folder)[-2]
    said = train(config, folder)
    assert f"iter_{last}.pth is corrupt; renamed to corrupt_iter_{last}.pth" in said
    assert f"after step {before.name[5:-4]} (attempt 4)" in said
    assert curve(folder) == curve(whole) and len(curve(whole)) == STEPS
    assert weights_sha256(folder) == weights_sha256(whole)

    elapsed = time.monotonic() - began
    costs = json.loads((folder / "attempts.json").read_text())["costs"]
    assert sorted(costs) == ["1", "2", "3", "4"] and {cost["ranks"] for cost in costs.values()} == {2}
    assert elapsed / 2 < sum(cost["seconds"] for cost in costs.values()) < elapsed
    # The plain command imported torch and DeepSpeed; the warm ones found them imported.
    assert costs["1"]["core_seconds"] > 4 and all(cost["core_seconds"] > 0.5 for cost in costs.values())


def test_a_crash_that_comes_again_is_not_tried_for_ever(world, config, whole):
    folder = world / "crashing"
    for _ in range(2):
        train(config, folder, code=1, TEST_RAISE=7)
    said = train(config, folder, code=2)
    assert "the last 2 attempts all ended after step 6" in said and "raised by the test" in said
    assert "--ignore-guard" in said and "guard.json" in said
    assert "Training" not in said, "refused before loading anything"
    train(config, folder, "--ignore-guard")
    assert curve(folder) == curve(whole)
    assert not (folder / "guard.json").exists()


def test_many_nan_steps_end_the_run_with_a_trace_and_the_last_good_checkpoint(world, config, whole):
    folder = world / "poisoned"
    said = train(config, folder, code=2, TEST_POISON="7:0")
    assert "not finite in 4 steps in a row, up to step 10" in said
    assert "Traceback" not in said
    assert [path.name for path in list_checkpoints(folder)] == ["iter_4.pth"], "step 8 was not saved"
    lines = metrics(folder)
    assert [line.get("skipped", False) for line in lines] == [False] * 6 + [True] * 4
    assert all(line["loss"] is None for line in lines[6:])
    trace = json.loads((folder / "nonfinite_step_10.json").read_text())
    rows = [micro["row"] for rank in trace["ranks"] for micro in rank["micro_batches"]]
    assert len(set(rows)) == 4 and trace["ranks"][1]["micro_batches"][0]["loss"] == "nan"
    assert all(
        document["file"].startswith("cn/") and document["stop"] > document["start"]
        for rank in trace["ranks"]
        for micro in rank["micro_batches"]
        for document in micro["documents"]
    )
    train(config, folder)
    assert curve(folder) == curve(whole) and weights_sha256(folder) == weights_sha256(whole)


@pytest.mark.parametrize("stage", [0, 3])  # the test above covers stage 2
def test_a_nan_step_is_skipped_and_changes_neither_weights_nor_optimizer(world, stage):
    flags = ("--max-steps", 5, "--save-steps", 4, "--lr", 5e-3, "--accumulative-counts", 2)
    config = tiny_run.render(world, f"skip{stage}.py", *flags, "--zero-stage", stage, hooks=HOOKS)
    folder = world / f"skip{stage}"
    train(config, folder, TEST_POISON="5:5")
    assert [line.get("skipped", False) for line in metrics(folder)] == [False] * 4 + [True]
    before, after = (folder / name for name in ("iter_4.pth", "iter_5.pth"))
    weights = [read_state_dict(path) for path in (before, after)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # DeepSpeed's files, written by this run: AdamW's moments and step counts.
    for file in [*before.glob("*_optim_states.pt")] or [before / "mp_rank_00_model_states.pt"]:
        states = [torch.load(path / file.name, weights_only=False) for path in (before, after)]
        moments = [
            dict(_tensors(state.get("optimizer_state_dict") or state["optimizer"])) for state in states
        ]
        assert moments[0].keys() == moments[1].keys() and any("exp_avg" in name for name in moments[0])
        assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def _tensors(value, name: str = ""):
    """Yields the tensors of AdamW's state in nested dicts and lists, by path."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(child, f"{name}/{key}")
