"""Traces a step of a real run to the documents it trained on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STEPS, RANKS, ACCUMULATION = 4, 2, 2


def stored(bin_file: Path, sample: int) -> list[int]:
    """Returns the ids of a document, read without the code under test."""
    return [abs(token) for token in json.loads(bin_file.read_text().splitlines()[sample])["tokens"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir, tiny_tokenizer_dir, write_processed, run_script, repo_root):
    """Trains a tiny model on two ranks past an epoch's end, in its own working folder. Returns the folder."""
    folder = tmp_path_factory.mktemp("traced")
    for name, numbers in (("a", range(18)), ("b", range(18, 30))):
        talks = [
            [
                {"role": "user", "content": f"question {n}" + " and so on" * (n % 5)},
                {"role": "assistant", "content": f"<<{n}>>"},
            ]
            for n in numbers
        ]
        write_processed(folder / "processed", {name: talks})
    scripts = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(repo_root / "tests")}}
    run_script(
        *("extend_tokenizer.py", "--tokenizer-path", tiny_tokenizer_dir),
        *("--tokenizer-w-special-tokens-save-dir", folder / "tokenizer"),
    )
    run_script(
        *("tokenize_dataset.py", "--processed-dir", "processed", "--tokenized-dir", "data"),
        *("--tokenizer-path", "tokenizer", "--heldout-share", 0.2),
        **scripts,
    )
    run_script(
        *("plan_packing.py", "--train-folder", "data", "--max-length", 108, "--output", "packs/p"),
        *("--processed-dir", "processed"),
        **scripts,
    )
    run_script(
        *("render_train_config.py", "--output", "config.py", "--model-path", tiny_model_dir),
        *("--tokenizer-path", "tokenizer", "--plan", "packs/p", "--max-epochs", 1.55, "--save-steps", 0),
        *("--accumulative-counts", ACCUMULATION),
        **scripts,
    )
    config = folder / "config.py"
    text = config.read_text().replace("custom_hooks = []", "custom_hooks = [dict(type=RecordBatches)]")
    config.write_text(
        text.replace("from torch.optim", "from train_hooks import RecordBatches\nfrom torch.optim")
    )
    scripts["env"] |= {"TEST_BATCHES": str(folder / "batches"), "OMP_NUM_THREADS": "1"}
    run_script(
        *("train_model.py", "config.py", "--work-dir", "run", "--manifest", "out/train.json"),
        *("--processes", RANKS),
        **scripts,
    )
    return folder


def test_traced_documents_are_what_the_model_saw(run, run_script):
    seen = [json.loads(line) for rank in range(RANKS) for line in open(f"{run}/batches.{rank}")]  # noqa: SIM115
    assert len(seen) == STEPS * RANKS * ACCUMULATION
    metrics = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    train = run / "data" / "chatml_llamav13_32k" / "train"
    epochs = set()
    for step in range(1, STEPS + 1):
        # Run from another working folder, with the run folder or its train.json.
        where = run / ("run" if step % 2 else "out/train.json")
        trace = json.loads(run_script("trace_step.py", "--run", where, "--step", step, "--json").stdout)
        assert trace["metrics"] == metrics[step - 1] and trace["notes"] == {}
        rows = {(row["rank"], row["micro_batch"]): row for row in trace["rows"]}
        epochs |= {row["epoch"] for row in trace["rows"]}
        mine = [each for each in seen if each["step"] == step]
        assert {(each["rank"], each["micro_batch"]) for each in mine} == rows.keys()
        for each in mine:
            documents = rows[each["rank"], each["micro_batch"]]["documents"]
            ids = [
                token
                for document in documents
                for token in stored(train / document["bin"], document["sample"])[
                    document["start"] : document["stop"]
                ]
            ]
            assert each["ids"] == ids
            lengths = [document["stop"] - document["start"] for document in documents]
            assert each["boundaries"] == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert len(epochs) > 1
    plan = json.loads((run / "packs" / "p" / "plan.json").read_text())
    record = json.loads((run / "out" / "train.json").read_text())
    assert record["plan_sha256"] == plan["plan_sha256"]
    assert record["rows_not_trained"] == int(1.55 * plan["rows"]) - len(seen) > 0


def test_the_schedule_ends_with_the_last_step(run):
    """An epoch with an odd number of rows ends between two ranks' micro-batches; the schedule counts rows."""
    plan = json.loads((run / "packs" / "p" / "plan.json").read_text())
    assert plan["rows"] % RANKS
    metrics = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    lowest, highest = 0.15 * 4e-5, 4e-5
    expected = [lowest + (highest - lowest) * (1 + math.cos(math.pi * k / STEPS)) / 2 for k in range(STEPS)]
    assert [line["lr"] for line in metrics] == pytest.approx(expected)
    assert metrics[-1]["epoch"] == pytest.approx(STEPS * RANKS * ACCUMULATION / plan["rows"], abs=1e-6)


def test_text_for_people(run, run_script):
    text = run_script("trace_step.py", "--run", run / "run", "--step", 2, "--rank", 1).stdout
    lines = text.splitlines()
    loss = json.loads((run / "run" / "metrics.jsonl").read_text().splitlines()[1])["loss"]
    assert f"step 2: loss {loss}" in lines[0]
    assert sum(line.startswith("rank 1, ") for line in lines) == ACCUMULATION
    assert not any(line.startswith("rank 0, ") for line in lines)
    assert any("a.jsonl:" in line or "b.jsonl:" in line for line in lines)
    ahead = run_script("trace_step.py", "--run", run / "run", "--step", STEPS + 5).stdout
    assert "not trained yet" in ahead and "micro-batch 1" in ahead
    # The same for a run that has not done its first step.
    young = run / "young"
    young.mkdir()
    for name in ("identity.json", "train_config.py"):
        (young / name).write_bytes((run / "run" / name).read_bytes())
    said = run_script("trace_step.py", "--run", young, "--step", STEPS + 5).stdout
    assert said.splitlines()[1:] == ahead.splitlines()[1:] and "rank 1, micro-batch 1" in said
    for flags, said in (
        (("--run", run / "run", "--step", 0), "invalid --step"),
        (("--run", run / "run", "--step", 1, "--rank", 2), "invalid --rank"),
        (("--run", run, "--step", 1), "is not a run"),
    ):
        refused = run_script("trace_step.py", *flags, check=False)
        assert refused.returncode == 2 and said in refused.stderr and "Traceback" not in refused.stderr


def test_a_plan_that_was_made_anew_is_refused(run, run_script):
    """Last in this file: it changes the plan."""
    run_script(
        *("plan_packing.py", "--train-folder", "data", "--max-length", 90, "--output", "packs/p"), cwd=run
    )
    refused = run_script("trace_step.py", "--run", run / "run", "--step", 1, check=False)
    assert refused.returncode == 2 and "is no longer the pack plan of this run" in refused.stderr
    refused = run_script(
        "train_model.py",
        "config.py",
        "--work-dir",
        "run",
        "--processes",
        RANKS,
        check=False,
        cwd=run,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert refused.returncode == 2 and "plan: " in refused.stderr
