"""The choice of the best checkpoint, and refused evaluations."""

from __future__ import annotations

import pytest

from snaketune.common.cli import UserError
from snaketune.common.files import read_json, write_json
from snaketune.common.run_files import RunFiles
from snaketune.reporting.checkpoint_curve import checkpoint_curve, link_best, remove_others

IDENTITY = "0123456789ab"
RECALLS = {0: 1.0, 10: 0.25, 20: 0.75, 30: 0.75, 40: 0.5}  # the base model is not a checkpoint


@pytest.fixture
def run(tmp_path):
    """A run folder with evaluations of the base model and steps 10 to 40; the loss falls by 1 each time."""
    same = {"heldout_sha256": "1", "tokenizer_sha256": "2", "template": "t", "mask": "m"}
    same |= {"control_tokens": "literal", "max_length": 9}
    train = {"run_folder": f"checkpoints/{IDENTITY}", "steps": 40, "identity": IDENTITY * 5}
    write_json(tmp_path / "train.json", train)
    for number, (step, recall) in enumerate(RECALLS.items()):
        label = {0: "base", 40: "tuned"}.get(step, f"iter_{step}")
        folder = tmp_path / "evaluation" / ("" if step in (0, 40) else f"checkpoints/{IDENTITY}")
        model = tmp_path / ("hf" if step == 40 else f"checkpoint_hf/{IDENTITY}/iter_{step}")
        if step:
            write_json(model / "manifest.json", {"step": step})
        pairs = [[(9.0 - number) * tokens, tokens] for tokens in (2, 3, 4)]
        write_json(
            folder / f"{label}.json",
            {**same, "label": label, "model": str(model), "conversations": {"a": pairs}},
        )
        row = {"scope": "all", "name": "", "metric": "recall", "value": recall, "low": 0.0, "high": 1.0}
        calls = {**same, "label": label, "summary": [row, {**row, "scope": "dataset", "value": 0.0}]}
        write_json(folder / f"tool_calls.{label}.json", {**calls, "selection": {}})
    return tmp_path


def curve_of(run, metric):
    folder = run / "evaluation"
    ends = ([folder / f"{label}.json", folder / f"tool_calls.{label}.json"] for label in ("base", "tuned"))
    evaluations = sorted(folder.glob("checkpoints/*/*.json"), reverse=True)
    return checkpoint_curve(RunFiles(run), *ends, evaluations, metric, run / "hf")


def test_the_earliest_of_the_best_is_linked_and_the_others_go(run):
    curve = curve_of(run, "recall")
    assert [(p["step"], p["figures"]["recall"]["value"]) for p in curve["points"]] == list(RECALLS.items())
    assert [p["figures"]["loss"]["value"] for p in curve["points"]] == pytest.approx([9, 8, 7, 6, 5])
    assert (curve["best"]["step"], curve["best"]["value"]) == (20, 0.75)
    link_best(curve, run / "evaluation", run / "best")
    remove_others(curve, run / "evaluation")
    assert (run / "best").resolve() == run / "checkpoint_hf" / IDENTITY / "iter_20"
    assert [path.name for path in (run / "checkpoint_hf" / IDENTITY).iterdir()] == ["iter_20"]

    last = curve_of(run, "loss")
    assert last["best"] == {"step": 40, "value": pytest.approx(5), "model": "../hf"}
    link_best(last, run / "evaluation", run / "best")
    assert (run / "best").resolve() == run / "hf"


def test_a_best_model_that_was_removed_is_said(run):
    (run / "checkpoint_hf" / IDENTITY / "iter_20" / "manifest.json").unlink()
    with pytest.raises(UserError, match="step 20, whose model was removed"):
        link_best(curve_of(run, "recall"), run / "evaluation", run / "best")


def test_an_evaluation_of_another_training_or_of_other_conversations_is_refused(run):
    path = run / "evaluation" / "checkpoints" / IDENTITY / "iter_10.json"
    content = read_json(path)
    write_json(path, {**content, "heldout_sha256": "3"})
    with pytest.raises(UserError, match="heldout_sha256 differs"):
        curve_of(run, "loss")
    path.unlink()
    write_json(path.parent.parent / "fedcba987654" / "iter_10.json", content)
    with pytest.raises(UserError, match="not an evaluation of this run's checkpoints"):
        curve_of(run, "loss")
    (path.parent.parent / "fedcba987654" / "iter_10.json").unlink()
    with pytest.raises(UserError, match="no checkpoint has the metric exact"):
        curve_of(run, "exact")
