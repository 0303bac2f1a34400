"""Comparisons of runs: paired differences against a slow bootstrap, and refused comparisons."""

from __future__ import annotations

import json
import random
from functools import partial

import numpy as np
import pytest

from snaketune.common.cli import UserError
from snaketune.common.files import write_json, write_text
from snaketune.common.run_files import RunFiles
from snaketune.reporting.comparison_page import render_comparison
from snaketune.reporting.run_comparison import compare


@pytest.fixture
def run(tmp_path):
    """Returns a function that writes a run whose evaluation has `samples` conversations of a and four of b."""
    return partial(write_run, tmp_path)


def write_run(folder, name, seed, lr=1e-4, samples=12, **heldout):
    rng = random.Random(seed)
    conversations = {
        dataset: [[(1 + rng.random()) * (5 + place), 5 + place] for place in range(count)]
        for dataset, count in (("a", samples), ("b", 4))
    }

    def loss(pairs):
        nats, tokens = map(sum, zip(*pairs, strict=True))
        return {"loss": nats / tokens, "trained_tokens": tokens}

    result = {
        **loss([*conversations["a"], *conversations["b"]]),
        "datasets": {dataset: loss(pairs) for dataset, pairs in conversations.items()},
        "conversations": conversations,
        "heldout_sha256": "1",
        "tokenizer_sha256": "2",
        **heldout,
    }
    train = {"steps": 2, "tokens": 20, "epochs": 1.0, "weights_sha256": "3", "world_size": 1}
    train["run_folder"] = "checkpoints/x"
    metrics = [{"step": step, "loss": 3.0 - step, "tokens": 10} for step in (1, 2)]
    config = {"train": {"lr": lr, "seed": 1}, "tool_calls": {"enabled": False}}
    files = {"config.json": config, "train.json": train, "evaluation/tuned.json": result}
    for path, content in files.items():
        write_json(folder / name / path, content)
    lines = "".join(json.dumps(record) + "\n" for record in metrics)
    write_text(folder / name / "checkpoints/x/metrics.jsonl", lines)
    return RunFiles(folder / name)


def test_the_difference_is_on_the_same_draws(run):
    base, other = run("base", 1), run("other", 2, lr=3e-4)
    found = compare([base, other])
    (table,) = found["tables"]
    for row in table["rows"]:
        pairs = [
            np.array(
                [
                    each
                    for dataset, own in one.read("evaluation/tuned.json")["conversations"].items()
                    if row["metric"] in (None, dataset)
                    for each in own
                ]
            )
            for one in (base, other)
        ]
        generator, draws = np.random.default_rng(1), []
        for _ in range(4000):
            drawn = generator.integers(len(pairs[0]), size=len(pairs[0]))
            before, after = (pair[drawn].sum(axis=0) for pair in pairs)
            draws.append(after[0] / after[1] - before[0] / before[1])
        change = row["runs"]["other"]["difference"]
        assert row["runs"]["base"]["difference"] is None
        scope = [
            one.read("evaluation/tuned.json")
            if row["metric"] is None
            else one.read("evaluation/tuned.json")["datasets"][row["metric"]]
            for one in (base, other)
        ]
        assert change["value"] == pytest.approx(scope[1]["loss"] - scope[0]["loss"])
        width = change["high"] - change["low"]
        assert [change["low"], change["high"]] == pytest.approx(
            np.percentile(draws, [2.5, 97.5]), abs=0.12 * width
        )
    assert found["settings"] == [{"key": "train.lr", "values": {"base": 1e-4, "other": 3e-4}}]


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"heldout_sha256": "9"}, "heldout_sha256"),
        ({"mask": "exact"}, "mask"),
        ({"samples": 11}, "max_samples"),
        ({"conversations": None}, "conversations"),
    ],
)
def test_other_conversations_are_told_and_not_compared(run, other, differs):
    runs = [run("base", 1), run("other", 2, **other), run("third", 3)]
    found = compare(runs)
    assert found["refused"] == [{"run": "other", "evaluation": "heldout", "differs": [differs]}]
    for row in found["tables"][0]["rows"]:
        assert row["runs"]["other"]["difference"] is None and row["runs"]["third"]["difference"]
    page = render_comparison(found, [each.metrics for each in runs])
    assert f"other: no difference for held-out loss, because these differ from base: {differs}." in page


def test_many_runs_and_too_few(run):
    runs = [run(f"run{number}<b>", number) for number in range(18)]
    page = render_comparison(compare(runs), [each.metrics for each in runs])
    assert "run17&lt;b&gt;" in page and "<b>" not in page
    assert "swatch line2" in page
    for few in (runs[:1], [runs[0], runs[0]]):
        with pytest.raises(UserError, match="nothing to compare"):
            compare(few)


def test_a_run_that_is_not_finished(run, tmp_path):
    runs = [run("base", 1), run("other", 2)]
    (tmp_path / "other/evaluation/tuned.json").unlink()
    with pytest.raises(UserError, match=r"other/evaluation/tuned\.json is missing"):
        compare(runs)
