"""`inspect_sample.py` shows all of a document's text, marked as stored."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
from ftdp_small_tokenizers import KINDS, extended_folder, small_tokenizer

from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.sample_view import Sample, paint, token_table
from snaketune.tokenized.tokenizing import tokenize_datasets
from terminal import read_terminal

CONVERSATIONS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello, you.\n12 * 7"}],
    [
        {"role": "system", "name": "plugin", "content": '[{"name": "get_weather"}]'},
        {"role": "user", "content": "今天天气怎么样？\x1b[31mred\x07"},
        {"role": "tool", "name": "plugin", "content": '{"name": "get_weather"}'},
        {"role": "environment", "name": "plugin", "content": "sunny 🙂"},
        {"role": "assistant", "content": "no", "loss": False},
    ],
]
MARKS = re.compile(r"\[[+=]|[+=]\]")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def tokenized(tmp_path, write_processed):
    """Returns a function that tokenises into the workflow's folder layout and returns the .bin file."""

    def tokenize(kind):
        write_processed(tmp_path / "in", {"d": CONVERSATIONS})
        shutil.copytree(extended_folder(kind), tmp_path / "shared" / "tokenizer" / "mine")
        out = tmp_path / "shared" / "data" / "x"
        tokenize_datasets(tmp_path / "in", out, small_tokenizer(kind), TokenizeOptions())
        return out / "chatml_llamav13_32k" / "train" / "cn" / "d" / "d.bin"

    return tokenize


@pytest.mark.parametrize("kind", KINDS)
def test_all_text_is_shown_with_its_mask(tokenized, kind):
    path = tokenized(kind)
    tokenizer = small_tokenizer(kind)
    stored = [json.loads(line)["tokens"] for line in path.read_bytes().splitlines()]
    for number, ids in enumerate(stored):
        sample = Sample(path, number, tokenizer)
        assert [(token.id, token.trained) for token in sample.tokens] == [(abs(i), i > 0) for i in ids]
        text = "".join(text for *_, text in sample.pieces())
        for part in (
            "<|im_start|>",
            "<|im_end|>",
            *(message["content"] for message in CONVERSATIONS[number]),
        ):
            assert part in text
        plain, colourful = paint(sample, False), paint(sample, True)
        assert MARKS.sub("", plain) == ESCAPES.sub("", colourful).replace("\u21b5", "")
        # No control character of the data reaches the terminal.
        assert "\x1b" not in plain and "\x07" not in colourful
        assert not number or r"\x1b[31mred\x07" in plain
        trained = "".join(re.findall(r"\[\+(.*?)\+\]", plain, re.DOTALL))
        assert ("Hello, you." if number == 0 else "get_weather") in trained
        assert ("hi" if number == 0 else "sunny") not in trained
        assert len(token_table(sample).splitlines()) == len(ids) + 1
    assert Sample(path, -1, tokenizer).number == 1


@pytest.mark.parametrize(
    ("environment", "colour"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
)
def test_colour_in_a_terminal(tokenized, repo_root, environment, colour):
    path = tokenized("byte_level")
    ours, theirs = pty.openpty()
    unset = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, repo_root / "workflow_scripts" / "inspect_sample.py", path, "0"],
        stdout=theirs,
        env=unset | {"TERM": "xterm"} | environment,
    )
    shown = read_terminal(ours, theirs)
    assert process.wait() == 0
    shown = shown.decode()
    if colour:
        # Trained text is green, masked text faint.
        assert "\x1b[32mHello, you." in shown and "\x1b[2muser" in shown and "[+" not in shown
    else:
        assert "\x1b" not in shown and "[+Hello, you." in shown and "[=<|im_start|>=]user" in shown


def test_a_token_that_somebody_typed_looks_like_text(tmp_path, write_processed, run_script):
    write_processed(tmp_path / "in", {"d": [[{"role": "user", "content": "stop<|im_end|>now"}]]})
    tokenize_datasets(tmp_path / "in", tmp_path / "out", small_tokenizer(), TokenizeOptions())
    path = tmp_path / "out" / "chatml_llamav13_32k" / "train" / "cn" / "d" / "d.bin"
    shown = run_script("inspect_sample.py", path, 0, "--tokenizer-path", extended_folder()).stdout
    assert "user\nstop<|im_end|>now[=<|im_end|>=]" in shown


def test_the_command_finds_the_tokenizer(tokenized, run_script, tmp_path):
    path = tokenized("byte_level")
    done = run_script("inspect_sample.py", path, 0)
    assert "document 0 of 2" in done.stdout and "[+Hello, you." in done.stdout and "\x1b" not in done.stdout
    assert "special tokens: <s> x1 (trained), <|im_start|> x2 (masked)" in done.stdout
    done = run_script("inspect_sample.py", path, "-1", "--color", "always")
    assert "\x1b[32m" in done.stdout and "sunny" in done.stdout
    assert "<|im_start|>" in run_script("inspect_sample.py", path, 1, "--ids").stdout.split("entry")[1]

    def error_of(*arguments):
        done = run_script("inspect_sample.py", *arguments, check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        return done.stderr

    assert "has no document 2" in error_of(path, 2)
    assert "made with a different tokenizer" in error_of(
        path, 0, "--tokenizer-path", extended_folder("smollm_like")
    )
    shutil.rmtree(tmp_path / "shared" / "tokenizer")
    assert "--tokenizer-path" in error_of(path, 0)
    assert "meta" in error_of(tmp_path / "no.bin", 0, "--tokenizer-path", extended_folder("byte_level"))
