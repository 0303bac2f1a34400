"""Resumes a run with a different number of ranks: same rows in the same steps, and matching losses."""

from __future__ import annotations

import json
import signal

import pytest

import tiny_run
from snaketune.training.step_trace import trace_step
from tiny_run import metrics, train

pytestmark = pytest.mark.slow

STEPS = 12
FLAGS = ("--max-steps", STEPS, "--save-steps", 0, "--lr", 5e-3, "--global-batch", 4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_run.make_world(tmp_path_factory.mktemp("ranks"), documents=40)  # about ten steps per epoch


@pytest.fixture(scope="module")
def whole(world):
    """The metrics of an uninterrupted run on two ranks."""
    train(tiny_run.render(world, "whole.py", *FLAGS), world / "whole")
    return metrics(world / "whole")


def stop(config, work_dir, step: int, processes: int) -> None:
    running = tiny_run.start(config, work_dir, processes=processes)
    tiny_run.wait_for_step(running, work_dir, step)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=120) == 75, tiny_run.log(work_dir)[-3000:]


@pytest.mark.parametrize(("stage", "shared"), [(0, 1), (2, 1), (3, 1), (1, 2)])
def test_two_ranks_then_one_then_two(world, whole, stage, shared):
    """With separate rows per rank, and with two ranks that share every row (sequence parallelism)."""
    alone = tiny_run.render(world, f"zero{stage}.py", *FLAGS, "--zero-stage", stage)
    config = tiny_run.render(
        world, "together.py", *FLAGS, "--zero-stage", stage, "--sequence-parallel", shared
    )
    folder = world / f"zero{stage}, {shared}"
    stop(config, folder, 3, processes=2)
    stop(alone, folder, 7, processes=1)
    said = train(config, folder, processes=2)
    assert ("for 2 ranks" in said) == (stage > 0), "ZeRO-0 has nothing to convert"
    assert not (folder / ".universal").exists()
    lines = metrics(folder)
    assert {line["attempt"] for line in lines} == {1, 2, 3}
    for line, expected in zip(lines, whole, strict=True):
        # Token counts identify the rows of a step as well as any other metric.
        for name in ("step", "tokens", "trained_tokens", "epoch", "lr"):
            assert line[name] == pytest.approx(expected[name], rel=1e-12)
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert line["grad_norm"] is None or line["grad_norm"] == pytest.approx(
            expected["grad_norm"], rel=1e-3
        )
    assert json.loads((folder / "finished.json").read_text())["global_batch"] == 4
    traced = [trace_step(folder, step) for step in (1, STEPS)]
    assert [trace["sequence_parallel"] for trace in traced] == [shared] * 2
    for trace in traced:
        assert [row["rank"] for row in trace["rows"]] == ([0, 1, 0, 1] if shared == 1 else [0] * 4)
        assert sum(row["tokens"] for row in trace["rows"]) == trace["metrics"]["tokens"]


def test_ranks_that_cannot_share_a_step_are_refused(world):
    config = tiny_run.render(world, "three.py", *FLAGS)
    said = train(config, world / "three", processes=3, code=2)
    assert "3 ranks cannot evenly share the 4 packed sequences of an optimizer step" in said
    config = tiny_run.render(world, "groups.py", *FLAGS, "--sequence-parallel", 2)
    assert "cannot divide 3 ranks into groups of sequence_parallel = 2" in train(
        config, world / "three", processes=3, code=2
    )
