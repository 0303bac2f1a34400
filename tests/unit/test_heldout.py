"""The held-out share is chosen by content, and exactly the rest is tokenised."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
from ftdp_small_tokenizers import extended_folder, small_tokenizer

from snaketune.chat_files.line_choice import is_held_out, is_valid
from snaketune.common.cli import UserError
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.evaluation.heldout import load_heldout
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.heldout_splitter import HeldoutSplitter, line_check
from snaketune.tokenized.tokenizing import tokenize_datasets


def conversation(number):
    return json.dumps([{"role": "user", "content": f"question {number}"}])


def write_source(root, numbers, end="\n"):
    source = root / "d" / "processed" / "sft_chat" / "f.jsonl"
    source.parent.mkdir(parents=True)
    source.write_text("".join(conversation(number) + end for number in numbers), newline="")
    return source


def splitter(folder, share, seed):
    return HeldoutSplitter(folder / "in", folder / "held", share, seed, line_check(ChatEncoding(), 2048))


def test_the_rule_itself():
    line = b'[{"role": "user"}]'
    fraction = int(hashlib.sha256(b"1024:" + line).hexdigest()[:16], 16) / 2**64
    assert is_held_out(line, fraction + 1e-9, 1024)
    assert not is_held_out(line, fraction - 1e-9, 1024)
    assert is_held_out(line + b"\r\n", fraction + 1e-9, 1024)
    assert not is_held_out(line, 0, 1024)
    assert {is_held_out(line, 0.5, seed) for seed in range(20)} == {True, False}


def test_the_valid_choice_is_independent_of_the_held_out_one():
    line = b'[{"role": "user"}]'
    fraction = int(hashlib.sha256(b"valid:1024:" + line).hexdigest()[:16], 16) / 2**64
    assert is_valid(line, fraction + 1e-9, 1024) and is_valid(line + b"\r\n", fraction + 1e-9, 1024)
    assert not is_valid(line, fraction - 1e-9, 1024)
    lines = [conversation(number).encode() for number in range(4000)]
    both = sum(is_valid(each, 0.5, 7) and is_held_out(each, 0.5, 7) for each in lines)
    assert 850 < both < 1150, "a quarter: the seeds are the same, the choices are not"


def samples_of(folder, split):
    """Returns the lines of a split's single .bin file; an empty list if there is none."""
    return [
        line for path in (folder / "chatml_llamav13_32k" / split).rglob("f.bin") for line in path.open("rb")
    ]


@pytest.mark.parametrize("lines_twice", [False, True])
def test_train_and_valid_make_the_whole(tmp_path, lines_twice):
    numbers = list(range(500)) * (1 + lines_twice)
    source = write_source(tmp_path / "in", numbers)
    tokenizer = small_tokenizer("byte_level")
    tokenize_datasets(tmp_path / "in", tmp_path / "copy", tokenizer, TokenizeOptions())
    every = samples_of(tmp_path / "copy", "train")
    assert len(every) == len(numbers)
    moved = {}
    for seed in (1, 2):
        options = TokenizeOptions(
            valid="holdout", valid_share=0.2, valid_seed=seed, heldout_share=0.1, heldout_seed=seed
        )
        out = tmp_path / f"seed{seed}"
        totals = tokenize_datasets(tmp_path / "in", out, tokenizer, options)["d"]["totals"]
        train, valid = samples_of(out, "train"), samples_of(out, "valid")
        # Applies the documented rule to the source. Documents keep their order within each split.
        place = {"train": [], "valid": [], "heldout": []}
        for line, sample in zip(source.read_bytes().splitlines(), every, strict=True):
            first = {
                name: int(hashlib.sha256(salt + line).hexdigest()[:16], 16) / 2**64
                for name, salt in (("heldout", b"%d:" % seed), ("valid", b"valid:%d:" % seed))
            }
            side = "heldout" if first["heldout"] < 0.1 else "valid" if first["valid"] < 0.2 else "train"
            place[side].append(sample)
        assert (train, valid) == (place["train"], place["valid"])
        assert not set(train) & set(valid), "no sample is on both sides, not even a copy"
        assert len(train) + len(valid) + totals["heldout"] == len(numbers)
        assert (totals["samples"], totals["valid_samples"]) == (len(train), len(valid))
        moved[seed] = set(valid)
    assert len(moved[1] - moved[2]) > 30 and len(moved[2] - moved[1]) > 30


def test_train_and_heldout_make_the_whole(tmp_path):
    numbers = [number % 300 for number in range(400)]  # 100 duplicates
    source = write_source(tmp_path / "in", numbers, end="\r\n")
    manifest = splitter(tmp_path, 0.2, 7).write("d", tmp_path / "d.json")
    held = (tmp_path / "held" / "d" / "processed" / "sft_chat" / "f.jsonl").read_text().splitlines()
    lines = source.read_bytes().splitlines()
    assert held == [line.decode() for line in lines if is_held_out(line, 0.2, 7)]
    assert manifest["totals"] == {"lines": 400, "heldout": len(held), "bad": 0}
    assert json.loads((tmp_path / "d.json").read_text()) == manifest
    assert 40 < len(held) < 120
    rest = [line for line in map(conversation, numbers) if line not in set(held)]
    assert len(rest) + len(held) == 400, "duplicates fall on the same side"

    tokenizer = small_tokenizer("byte_level")
    made = tokenize_datasets(
        tmp_path / "in",
        tmp_path / "out",
        tokenizer,
        TokenizeOptions(heldout_share=0.2, heldout_seed=7),
        processes=2,
    )
    assert made["d"]["totals"]["heldout"] == len(held)
    write_source(tmp_path / "rest", [json.loads(line)[0]["content"].split()[1] for line in rest])
    tokenize_datasets(tmp_path / "rest", tmp_path / "out_rest", tokenizer, TokenizeOptions())
    name = "chatml_llamav13_32k/train/cn/d/f.bin"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out_rest" / name).read_bytes()
    assert (tmp_path / "out" / f"{name}.meta").read_bytes() == (
        tmp_path / "out_rest" / f"{name}.meta"
    ).read_bytes()


@pytest.mark.parametrize("control_tokens", ["literal", "error"])
def test_a_bad_line_is_quarantined_and_nowhere_else(tmp_path, run_script, control_tokens):
    answer = ', {"role": "assistant", "content": "yes"}]'
    good = [conversation(number)[:-1] + answer for number in range(300)]
    typed = [conversation(f"<|im_end|> {number}") for number in range(100)]
    bad = [f"oops {number}" for number in range(100)] + [
        conversation(number).replace("user", "bot") for number in range(100)
    ]
    bad.append(conversation("long " * 2_000_000))
    lines = good + typed + bad
    random.Random(5).shuffle(lines)
    source = write_source(tmp_path / "in", [])
    source.write_text("\n".join(lines))
    options = ("--processed-dir", tmp_path / "in", "--control-tokens", control_tokens)
    options += ("--tokenizer-path", extended_folder())
    run_script(
        *("split_heldout.py", *options, "--dataset", "d", "--output-dir", tmp_path / "held"),
        *("--manifest", tmp_path / "m.json", "--share", 0.3, "--seed", 3),
    )
    run_script(
        *("tokenize_dataset.py", *options, "--tokenized-dir", tmp_path / "out"),
        *("--heldout-share", 0.3, "--heldout-seed", 3, "--on-bad-sample", "quarantine", "--max-bad-share", 1),
        *("--valid", "holdout", "--valid-share", 0.2),
    )
    refused = bad + typed * (control_tokens == "error")
    (file,) = (tmp_path / "held").rglob("*.jsonl")
    held = file.read_text().splitlines()
    split = json.loads((tmp_path / "m.json").read_text())["totals"]
    totals = json.loads((tmp_path / "out" / "manifests" / "d.json").read_text())["totals"]
    (quarantine,) = (tmp_path / "out").rglob("*.quarantine.jsonl")
    aside = [json.loads(line)["raw"] for line in quarantine.read_text().splitlines()]
    assert sorted(aside) == sorted(refused) and not set(held) & set(refused)
    assert totals["heldout"] == split["heldout"] == len(held) > 50
    assert split["bad"] == sum(is_held_out(line.encode(), 0.3, 3) for line in refused) > 30
    assert totals["valid_samples"] > 20
    # Evaluation, hours later, accepts every line.
    assert len(load_heldout(tmp_path / "held", small_tokenizer(), ChatEncoding(), 2048)) == len(held)
    assert len(lines) == sum(totals[key] for key in ("samples", "valid_samples", "heldout", "quarantined"))


def test_control_tokens_need_the_tokenizer():
    with pytest.raises(UserError, match="pass --tokenizer-path"):
        line_check(ChatEncoding(control_tokens="error"), 2048)


def test_script_and_repeat(tmp_path, run_script):
    write_source(tmp_path / "in", range(100))
    arguments = ("--processed-dir", tmp_path / "in", "--dataset", "d", "--output-dir", tmp_path / "held")
    arguments += ("--manifest", tmp_path / "m.json", "--share", 0.1, "--seed", 3)
    run_script("split_heldout.py", *arguments)
    first = (tmp_path / "m.json").read_bytes()
    run_script("split_heldout.py", *arguments)
    assert (tmp_path / "m.json").read_bytes() == first


@pytest.mark.parametrize("share", [-0.1, 1, 2.5])
def test_share_out_of_range(tmp_path, share):
    write_source(tmp_path / "in", range(3))
    with pytest.raises(UserError, match="share is out of range"):
        splitter(tmp_path, share, 1)


def test_unknown_dataset(tmp_path):
    write_source(tmp_path / "in", range(3))
    with pytest.raises(UserError, match="no dataset 'x'"):
        splitter(tmp_path, 0.1, 1).write("x", tmp_path / "x.json")
