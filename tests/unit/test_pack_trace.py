"""Traces rows of a plan back to lines of the JSONL files, and compares plans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from pack_samples import write_bin
from snaketune.common.cli import UserError
from snaketune.packing.pack_plan import open_plan
from snaketune.packing.packed_sequences import PackedSequences
from snaketune.packing.plan_diff import diff_plans
from snaketune.packing.planner import make_plan
from snaketune.packing.row_tracer import RowTracer


def conversation(number: int) -> list[dict]:
    """Returns a conversation with a unique text."""
    return [
        {"role": "user", "content": f"question {number}" + " and so on" * (number % 7)},
        {"role": "assistant", "content": f"<<{number}>>"},
    ]


@pytest.fixture(scope="module")
def extended_tokenizer(tmp_path_factory, tiny_tokenizer_dir, run_script):
    folder = tmp_path_factory.mktemp("tokenizer")
    run_script(
        *("extend_tokenizer.py", "--tokenizer-path", tiny_tokenizer_dir),
        *("--tokenizer-w-special-tokens-save-dir", folder),
    )
    return folder


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory, extended_tokenizer, write_processed, run_script):
    """Tokenises and packs two datasets with held-out lines, lines moved to valid/, and bad lines."""
    folder = tmp_path_factory.mktemp("trace")
    processed = folder / "processed"
    write_processed(
        processed, {"a": [conversation(n) for n in range(60)], "b": [conversation(n) for n in range(60, 90)]}
    )
    source = processed / "a" / "processed" / "sft_chat" / "a.jsonl"
    lines = source.read_text().splitlines(keepends=True)
    lines[5], lines[20] = "{}\n", "not JSON\n"
    source.write_text("".join(lines))
    run_script(
        *("tokenize_dataset.py", "--processed-dir", processed, "--tokenized-dir", folder / "data"),
        *("--tokenizer-path", extended_tokenizer, "--heldout-share", 0.2, "--valid", "holdout"),
        *("--valid-share", 0.2, "--on-bad-sample", "quarantine", "--max-bad-share", 0.5),
    )
    run_script(
        *("plan_packing.py", "--train-folder", folder / "data", "--max-length", 48),
        *("--processed-dir", processed, "--output", folder / "plan"),
    )
    return folder


def test_every_document_is_found_on_its_line(tokenized, extended_tokenizer):
    plan = open_plan(tokenized / "plan")
    tokenizer = Tokenizer.from_file(str(extended_tokenizer / "tokenizer.json"))
    rows, tracer = PackedSequences(plan), RowTracer(plan)
    seen = whole = 0
    for number in range(len(plan)):
        ids, boundaries = rows[number]["input_ids"], rows[number]["cumulative_len"]
        for traced, begin, end in zip(tracer.row(number), boundaries[:-1], boundaries[1:], strict=True):
            text = tokenizer.decode(ids[begin:end].tolist())
            line = Path(traced.source).read_text().splitlines()[traced.line - 1]
            question, answer = (message["content"] for message in json.loads(line))
            if (traced.start, traced.stop) == (0, traced.tokens):
                assert question in text and answer in text
                whole += 1
            assert traced.stop - traced.start == end - begin
            assert f"/{traced.dataset}/" in traced.source and f"/{traced.dataset}/" in traced.bin
            seen += traced.start == 0
    assert tracer.notes == {}
    assert whole > 20
    assert seen == plan.totals["documents"] < 88 - 10, "lines are held out and moved to valid"


def test_a_source_that_changed_is_told(tokenized, tmp_path):
    processed = tmp_path / "processed"
    shutil.copytree(tokenized / "processed", processed)
    file = processed / "a" / "processed" / "sft_chat" / "a.jsonl"
    file.write_text(file.read_text() + json.dumps(conversation(99)) + "\n")
    tracer = RowTracer(open_plan(tokenized / "plan"), processed)
    traced = [each for number in range(len(tracer.plan)) for each in tracer.row(number)]
    assert {each.dataset: each.line is None for each in traced} == {"a": True, "b": False}
    assert list(tracer.notes) == ["cn/a/a.bin"]
    assert "is not the file that was tokenised" in tracer.notes["cn/a/a.bin"]


def test_plan_script_counts_and_refuses(tokenized, run_script, tmp_path):
    flags = ("--train-folder", tokenized / "data", "--max-length", 48, "--output", tmp_path / "p")
    said = run_script("plan_packing.py", *flags, "--mode", "xtuner").stdout
    plan = json.loads((tmp_path / "p" / "plan.json").read_text())
    lost = plan["totals"]["dropped"]["end_of_file"]
    assert f"{lost['documents']} documents, {lost['tokens']} tokens (end_of_file)" in said
    assert plan["processed_dir"] is None and all(len(file["bin_sha256"]) == 64 for file in plan["files"])
    (tmp_path / "order.txt").write_text("cn/a/gone.bin\n")
    refused = run_script("plan_packing.py", *flags, "--data-order", tmp_path / "order.txt", check=False)
    assert refused.returncode == 2 and "gone.bin is not in any manifest" in refused.stderr


def test_same_plan(tokenized, tmp_path, run_script):
    plan = open_plan(tokenized / "plan")
    plan.write(tmp_path / "copy")
    assert diff_plans(tokenized / "plan", tmp_path / "copy") == {"same": True}
    assert "The same plan" in run_script("diff_plans.py", tokenized / "plan", tmp_path / "copy").stdout


def test_what_moved(tmp_path, run_script):
    """Reports every move from a plan of four rows to plans with one more file, a different seed, shorter rows."""
    write_bin(tmp_path / "a.bin", [[number] * 8 for number in range(1, 5)])
    write_bin(tmp_path / "b.bin", [[9] * 2, [9] * 20])
    old = make_plan(tmp_path, ["a.bin"], 10, bin_sha256=["1"])
    more = make_plan(tmp_path, ["a.bin", "b.bin"], 10, bin_sha256=["1", "2"])
    other = make_plan(tmp_path, ["a.bin"], 10, seed=5, bin_sha256=["3"])
    short = make_plan(tmp_path, ["a.bin"], 5, bin_sha256=["1"])
    for name, plan in (("old", old), ("more", more), ("other", other), ("short", short)):
        plan.write(tmp_path / name)

    def steps(plan):
        """Returns the step of each document of a.bin, with two rows per step."""
        order = plan.order(0).tolist()
        return {
            each.sample: order.index(row) // 2 + 1
            for row in range(len(plan))
            for each in plan.row(row)
            if plan.files[each.file]["name"] == "a.bin"
        }

    found = diff_plans(tmp_path / "old", tmp_path / "more", global_batch=2)
    assert found["settings"] == {} and found["files"] == {"only_a": [], "only_b": ["b.bin"], "changed": []}
    counts = found["documents"]
    assert (counts["only_a"], counts["only_b"], counts["both"]) == (0, 2, 4)
    assert (counts["cut_otherwise"], counts["with_others"]) == (
        0,
        1,
    )  # the short document joined one of the four
    before, after = steps(old), steps(more)
    assert counts["at_another_step"] == sum(before[n] != after[n] for n in before)
    for each in found["moved"]:
        assert each["file"] == "a.bin" and each["steps"] == [before[each["sample"]], after[each["sample"]]]

    found = diff_plans(tmp_path / "old", tmp_path / "other", global_batch=2)
    assert found["settings"] == {"seed": [1024, 5]} and found["files"]["changed"] == ["a.bin"]
    assert found["documents"]["with_others"] == 0
    assert found["documents"]["at_another_step"] == sum(steps(old)[n] != steps(other)[n] for n in range(4))
    assert diff_plans(tmp_path / "old", tmp_path / "short")["documents"]["cut_otherwise"] == 4
    said = run_script(
        "diff_plans.py", tmp_path / "old", tmp_path / "more", "--global-batch", 2, "--show", 1
    ).stdout
    assert counts["moved"] > 1 and f"moved: the first 1 of {counts['moved']}, from A -> to B" in said
    assert "files only in B: 1, b.bin" in said and "4 in both, 0 only in A, 2 only in B" in said
    with pytest.raises(UserError, match=r"plan\.json is missing"):
        diff_plans(tmp_path / "old", tmp_path / "nothing")
