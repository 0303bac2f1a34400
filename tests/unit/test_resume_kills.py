"""Two ranks, killed ten times at random moments, end with the losses and weights of an uninterrupted run."""

from __future__ import annotations

import os
import random

import pytest

from tiny_run import curve, make_world, metrics, render, train, train_with_kills, weights_sha256

pytestmark = pytest.mark.slow

STEPS, KILLS = 72, 10


def test_ten_kills_change_no_bit(tmp_path):
    seed = int(os.environ.get("SNAKETUNE_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"SNAKETUNE_TEST_SEED={seed}")
    world = make_world(tmp_path)
    flags = ("--max-steps", STEPS, "--save-steps", 3, "--lr", 5e-3, "--global-batch", 4)
    config = render(world, "config.py", *flags)
    train(config, world / "whole")
    kills = train_with_kills(config, world / "killed", KILLS, seed, STEPS)
    print(*kills, sep="\n")
    assert len(kills) == KILLS and [kill.moment for kill in kills].count("save") == 3
    assert sum(len(kill.lines) for kill in kills) > 0 and metrics(world / "killed")[-1]["attempt"] > 1
    assert curve(world / "killed") == curve(world / "whole")
    assert len(curve(world / "whole")) == STEPS
    assert weights_sha256(world / "killed") == weights_sha256(world / "whole")
    assert not list((world / "killed").glob(".iter_*.tmp"))
