"""From a score of a real run back to the conversations, and files that no longer match their records."""

from __future__ import annotations

import hashlib
import re

import pytest

from kept import kept
from snaketune.common.files import read_json, write_json
from snaketune.provenance.records import lineage
from snaketune.provenance.tree import verify


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip_last_bit(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_score_leads_back_to_the_conversations(finished, run_script):
    run = finished.folder / "results" / "demo"
    tree = run_script("lineage.py", run / "evaluation" / "tool_calls.tuned.json").stdout
    titles = ("evaluation, tuned model", "Hugging Face folder", "checkpoint", "pack plan", "tokenised data")
    titles += ("dataset tool_calls", "tokenised shard", "JSONL file")
    lines = tree.splitlines()
    # tool_calls is the last dataset, so the last match of each title leads to its file.
    places = [
        [n for n, line in enumerate(lines) if re.search(rf"(^|─ ){title} ", line)][-1] for title in titles
    ]
    indents = [lines[n].index(title) for n, title in zip(places, titles, strict=True)]
    assert places == sorted(places) and indents == sorted(set(indents)), tree
    source = finished.folder / "processed/tool_calls/processed/sft_chat/tool_calls.jsonl"
    assert f"lines: {len(source.read_bytes().splitlines())}" in tree
    (shard,) = run.parent.glob("shared/data/*/chatml_llamav13_32k/train/cn/tool_calls/*.bin")
    (tokenizer,) = run.parent.glob("shared/tokenizer/*/tokenizer.json")
    for path in (source, shard, tokenizer, run / "train_config.py"):
        assert sha256(path) in tree, path
    for word in ("git_commit: ", "versions: ", "recall: ", "base model", "held-out conversations"):
        assert word in tree


def test_the_slurm_jobs_of_conversion_and_evaluation_are_named(finished, run_script):
    run = finished.folder / "results" / "demo"
    score, manifest = run / "evaluation" / "tuned.json", run / "hf" / "manifest.json"
    with kept(score), kept(manifest):
        for path, job in ((score, "101"), (manifest, "102")):
            write_json(path, {**read_json(path), "slurm_job_id": job})
        tree = run_script("lineage.py", score).stdout
    assert "Slurm job: 101" in tree and "Slurm job: 102" in tree


def test_verifying_finds_each_change_and_nothing_else(finished):
    results = finished.folder / "results"
    score = results / "demo" / "evaluation" / "tuned.json"
    checked, wrong = verify(lineage(score))
    assert checked > 20 and wrong == []
    alone = [
        finished.folder / "processed/plain_chat/processed/sft_chat/plain_chat.jsonl",
        next(results.glob("shared/data/*/chatml_llamav13_32k/train/cn/tool_calls/*.bin.meta")),
        results
        / "demo"
        / read_json(results / "demo" / "train.json")["checkpoint"]
        / "mp_rank_00_model_states.pt",
        results / "demo" / "train_config.py",
    ]
    heldout = next(results.glob("shared/data/*/heldout/tool_calls/processed/sft_chat/*.jsonl"))
    weights = results / "demo" / "hf" / "model.safetensors"
    expected = {path: {str(path)} for path in alone}
    expected[weights] = {str(weights), f"the model evaluated in {score}"}
    expected[heldout] = {f"{heldout.parents[3]} (held-out conversations)"}
    for path, named in expected.items():
        with kept(path):
            flip_last_bit(path)
            assert {each.check.what for each in verify(lineage(score))[1]} == named
    data = alone[0].read_bytes()
    with kept(alone[0]):
        alone[0].unlink()
        (gone,) = verify(lineage(score))[1]
        alone[0].write_bytes(data)
    assert gone.found is None and gone.record.title == "JSONL file"


def test_the_command_says_what_does_not_match(finished, run_script):
    results = finished.folder / "results"
    assert re.fullmatch(r"\d+ digests match\n", run_script("verify_results.py", results).stdout)
    (plan,) = results.glob("shared/data/*/packs/*")
    with kept(plan / "rows.npy") as path:
        flip_last_bit(path)
        done = run_script("verify_results.py", plan, check=False)
    assert done.returncode == 1 and f"does not match: {plan} (pack plan)" in done.stdout


@pytest.mark.parametrize("name", ["nothing.json", "config.yaml"])
def test_what_is_no_result(finished, run_script, name):
    done = run_script("lineage.py", finished.folder / name, check=False)
    assert done.returncode == 2 and "error:" in done.stderr
