"""Each kind of bad input gives one message with file, line and field."""

from __future__ import annotations

import json

import pytest
from ftdp_small_tokenizers import small_tokenizer

from snaketune.chat_format.chat_template import MessageError
from snaketune.common.cli import UserError
from snaketune.encoding.batch_encoder import encode_conversation
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.tokenizing import tokenize_datasets

GOOD = b'[{"role": "user", "content": "hi"}]'


def message(**fields):
    return json.dumps(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", **fields}]
    ).encode()


def without(key):
    bad = {"role": "assistant", "content": "yes"}
    del bad[key]
    return json.dumps([{"role": "user", "content": "hi"}, bad]).encode()


# (third line of the file, texts that the message must contain)
BAD = {
    "not JSON": (b"{broken", ["not JSON"]),
    "two values": (GOOD + GOOD, ["not JSON"]),
    "cut off": (GOOD[:-2], ["not JSON"]),
    "blank": (b"", ["blank line", "remove the line"]),
    "spaces": (b"  \t", ["blank line"]),
    "not UTF-8": (b'[{"role": "user", "content": "\xff\xfe"}]', ["not JSON", "UTF-8"]),
    "object": (b'{"messages": []}', ["conversation", "dict", "a list of messages"]),
    "string": (b'"hello"', ["a list of messages"]),
    "null": (b"null", ["a list of messages"]),
    "message is a string": (b'["hi"]', ["[0]", "an object with role and content"]),
    "no role": (without("role"), ["[1].role", "no 'role'", "one of system, user"]),
    "no content": (without("content"), ["[1].content", "no 'content'"]),
    "unknown role": (message(role="bot"), ["[1].role", "'bot'", "one of system, user"]),
    "role is a number": (message(role=3), ["[1].role", "3 (int)"]),
    "role is a list": (message(role=["user"]), ["[1].role", "list"]),
    "content is null": (message(content=None), ["[1].content", "NoneType", "a string"]),
    "content is a list": (message(content=[{"type": "text"}]), ["[1].content", "list", "a string"]),
    "name is a number": (message(name=5), ["[1].name", "5 (int)", "a string"]),
    "name is a list": (message(name=["plugin"]), ["[1].name", "list"]),
    "loss is a string": (message(loss="false"), ["[1].loss", "'false'", "true or false"]),
    "loss is a number": (message(loss=0.5), ["[1].loss", "0.5"]),
    "unknown type": (
        message(type="chat"),
        ["[1].type", "'chat'", "current or icl or prefix for role assistant"],
    ),
    "type is null": (message(type=None), ["[1].type", "None"]),
    "meta for the assistant": (message(type="meta"), ["[1].type", "'meta'"]),
    "meta for the user": (message(role="user", type="meta"), ["[1].type", "'meta'"]),
    "prefix without loss": (message(type="prefix", loss=False), ["[1].type", "'prefix'", "loss: false"]),
    "end without loss": (message(type="end", loss=False), ["[1].type", "'end'"]),
    "tool first": (b'[{"role": "tool", "content": "{}"}]', ["[0].role", "message first"]),
    "thought first": (b'[{"role": "thought", "content": "hm"}]', ["[0].role", "message first"]),
    "half a character": (b'[{"role": "user", "content": "a\\ud83d"}]', ["turn 1", "surrogate"]),
    "half a character in a name": (
        b'[{"role": "user", "content": "", "name": "\\uDC00"}]',
        ["turn 1", "surrogate"],
    ),
    "nested too deeply": (b"[" * 100_000, ["not JSON"]),
}


def tokenize(tmp_path, data, **options):
    source = tmp_path / "in" / "d" / "processed" / "f.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(data)
    return tokenize_datasets(
        tmp_path / "in", tmp_path / "out", small_tokenizer("byte_level"), TokenizeOptions(), **options
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_line(tmp_path, case):
    line, expected = BAD[case]
    with pytest.raises(UserError) as caught:
        tokenize(tmp_path, b"\n".join([GOOD, GOOD, line, GOOD]) + b"\n")
    text = str(caught.value)
    assert f"{tmp_path / 'in' / 'd' / 'processed' / 'f.jsonl'}:3: " in text
    for part in (*expected, "found:", "expected:", "to fix:"):
        assert part in text, text
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()], "nothing is left behind"


def test_half_a_character_in_memory():
    with pytest.raises(MessageError, match="surrogate"):
        encode_conversation(
            [{"role": "user", "content": "a\ud83d"}], small_tokenizer("byte_level"), ChatEncoding()
        )


def test_the_first_bad_line_of_many_blocks_is_named(tmp_path):
    lines = [GOOD.replace(b"hi", b"x" * 1000)] * 3000
    lines[1500] = lines[2500] = b"oops"
    with pytest.raises(UserError, match=r"f\.jsonl:1501: not JSON"):
        tokenize(tmp_path, b"\n".join(lines), processes=3)


def test_blank_line_at_the_end(tmp_path):
    with pytest.raises(UserError, match=r"f\.jsonl:2: blank line"):
        tokenize(tmp_path, GOOD + b"\n\n")


@pytest.mark.parametrize("data", [b"", GOOD, GOOD + b"\n"])
def test_what_is_not_an_error(tmp_path, data):
    assert tokenize(tmp_path, data)["d"]["totals"]["samples"] == (1 if data else 0)


def test_nan_and_repeated_keys_as_python_reads_them(tmp_path):
    line = b'[{"role": "system", "role": "user", "content": "hi", "score": NaN}]'
    tokenize(tmp_path / "odd", line)
    tokenize(tmp_path / "plain", GOOD)
    name = "out/chatml_llamav13_32k/train/cn/d/f.bin"
    assert (tmp_path / "odd" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_whole_surrogate_pair_is_fine(tmp_path):
    tokenize(tmp_path / "escaped", b'[{"role": "user", "content": "\\ud83d\\ude42"}]')
    tokenize(tmp_path / "plain", '[{"role": "user", "content": "🙂"}]'.encode())
    name = "out/chatml_llamav13_32k/train/cn/d/f.bin"
    assert (tmp_path / "escaped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_script_errors(tmp_path, run_script, tiny_tokenizer_dir):
    source = tmp_path / "in" / "d" / "processed" / "f.jsonl"
    source.parent.mkdir(parents=True)
    source.write_bytes(GOOD + b"\n")
    base = ("tokenize_dataset.py", "--processed-dir", tmp_path / "in", "--tokenized-dir", tmp_path / "out")

    def error_of(*arguments):
        done = run_script(*base, *arguments, check=False)
        assert done.returncode == 2
        assert "error: " in done.stderr and "Traceback" not in done.stderr
        return done.stderr

    save = ("--tokenizer-w-special-tokens-save-dir", tmp_path / "tokenizer")
    assert "lacks chat tokens" in error_of("--tokenizer-path", tiny_tokenizer_dir)
    assert "does not exist" in error_of("--tokenizer-path", tmp_path / "nothing here")
    arguments = ("--tokenizer-path", tiny_tokenizer_dir, *save)
    assert "no dataset 'x'" in error_of(*arguments, "--dataset", "x")
    assert "found 0, expected at least 1" in error_of(*arguments, "--max-length", "0")
    assert "found 1, expected less than 1" in error_of(*arguments, "--heldout-share", "1")
    assert "out of range" in error_of(*arguments, "--threads", "0")
