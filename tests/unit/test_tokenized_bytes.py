"""Compares tokenised files with a slow, independent implementation of XTuner's format."""

from __future__ import annotations

import json
import random

import pytest
from ftdp_conversations import conversations
from ftdp_reference import bin_and_meta, signed_tokens
from ftdp_small_tokenizers import KINDS, small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snaketune.chat_files.processed_layout import find_datasets
from snaketune.encoding.batch_encoder import (
    BatchEncoder,
    encode_conversation,
    encode_conversations,
    signed_ids,
)
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.tokenizing import tokenize_datasets

pytestmark = pytest.mark.slow


def encoder_of(tokenizer):
    return lambda text: tokenizer.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batch=st.lists(conversations(), max_size=4), max_length=st.sampled_from([1, 7, 32768]))
def test_ids_equal_the_reference(kind, batch, max_length):
    tokenizer = small_tokenizer(kind)
    encode, bos = encoder_of(tokenizer), tokenizer.bos_token_id
    expected = [signed_tokens(each, encode, bos, max_length) for each in batch]
    before = json.dumps(batch)
    as_xtuner = ChatEncoding(mask="compat", control_tokens="control")
    assert encode_conversations(batch, tokenizer, as_xtuner, max_length) == expected
    assert [encode_conversation(each, tokenizer, as_xtuner, max_length) for each in batch] == expected
    fast = BatchEncoder(tokenizer, as_xtuner, many=True)
    pieces = fast.encode_turns([fast.turns(each) for each in batch])
    assert [signed_ids(each, max_length) for each in pieces] == expected
    for each in batch:
        # `line` encodes by words, where that is exact: not with id 0, and only with the SentencePiece tokenizer.
        line, whole = fast.line(fast.turns(each)), signed_tokens(each, encode, bos)
        assert line is not None or kind != "sentencepiece" or 0 in whole
        assert line is None or line == json.dumps({"tokens": whole}).encode() + b"\n"
    assert json.dumps(batch) == before, "the conversations must not change"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.lists(conversations().filter(bool), max_size=6),
    max_length=st.sampled_from([1, 7, 32768]),
    escape=st.booleans(),
)
def test_files_equal_the_reference(kind, batch, max_length, escape, tmp_path_factory):
    tokenizer = small_tokenizer(kind)
    root = tmp_path_factory.mktemp("case")
    source = root / "in" / "data 1" / "processed" / "any" / "file.v1.jsonl"
    source.parent.mkdir(parents=True)
    lines = [json.dumps(each, ensure_ascii=escape) + "\n" for each in batch]
    source.write_text("".join(lines), encoding="utf-8", newline="")
    manifests = tokenize_datasets(
        root / "in", root / "out", tokenizer, TokenizeOptions(max_length=max_length, control_tokens="control")
    )
    expected = bin_and_meta(batch, encoder_of(tokenizer), tokenizer.bos_token_id, max_length)
    files = root / "out" / "chatml_llamav13_32k" / "train" / "cn" / "data 1"
    assert (files / "file.v1.bin").read_bytes() == expected["train"][0]
    assert (files / "file.v1.bin.meta").read_bytes() == expected["train"][1]
    assert sorted(path.name for path in files.iterdir()) == ["file.v1.bin", "file.v1.bin.meta"]
    stored = [json.loads(line)["tokens"] for line in expected["train"][0].splitlines()]
    totals = manifests["data 1"]["totals"]
    assert totals["samples"] == len(stored)
    assert totals["tokens"] == sum(map(len, stored))
    assert totals["trained_tokens"] == sum(token > 0 for tokens in stored for token in tokens)
    assert totals["longest"] == max(map(len, stored), default=0)


def write_lines(path, lines):
    path.parent.mkdir(parents=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize(("samples", "kept"), [(50_099, 0), (50_100, 501)])
def test_valid_copies_are_kept_above_500(tmp_path, samples, kept):
    tokenizer = small_tokenizer("byte_level")
    choices = [json.dumps([{"role": "user", "content": text}]) for text in ("", "a", "hello", "12 * 7")]
    rng = random.Random(0)
    lines = rng.choices(choices, k=samples)
    write_lines(tmp_path / "in" / "d" / "processed" / "f.jsonl", lines)
    manifest = tokenize_datasets(
        tmp_path / "in", tmp_path / "out", tokenizer, TokenizeOptions(), processes=2
    )["d"]
    train, valid = (
        tmp_path / "out" / "chatml_llamav13_32k" / split / "cn" / "d" for split in ("train", "valid")
    )
    encode = encoder_of(tokenizer)
    by_line = {line: signed_tokens(json.loads(line), encode, tokenizer.bos_token_id) for line in choices}
    stored = [json.loads(line)["tokens"] for line in (train / "f.bin").read_bytes().splitlines()]
    assert stored == [by_line[line] for line in lines]
    assert manifest["totals"]["valid_samples"] == kept
    if not kept:
        assert list(valid.iterdir()) == []
        return
    copies = (train / "f.bin").read_bytes().splitlines(keepends=True)[99::100]
    assert (valid / "f.bin").read_bytes() == b"".join(copies)
    expected = bin_and_meta([json.loads(line) for line in lines[:200]], encode, tokenizer.bos_token_id)
    meta = (train / "f.bin.meta").read_bytes()
    assert meta[128:][: 200 * 16] == expected["train"][1][128:]


def test_bytes_do_not_depend_on_processes_or_blocks(tmp_path, monkeypatch):
    import snaketune.chat_files.line_reader

    tokenizer = small_tokenizer("sentencepiece")
    rng = random.Random(1)
    words = ["hello", "你好", "x = 1", "\n", "<|im_end|>", "12"]
    lines = []
    for _ in range(3000):
        text = " ".join(rng.choices(words, k=rng.randint(0, 30)))
        lines.append(
            json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}])
        )
    write_lines(tmp_path / "in" / "d" / "processed" / "f.jsonl", lines)
    write_lines(tmp_path / "in" / "e" / "processed" / "f.jsonl", lines[:7])
    results = []
    for processes, block_bytes in ((1, 1 << 20), (3, 10_000), (2, 300)):
        monkeypatch.setattr(
            snaketune.chat_files.line_reader.LineReader.__init__, "__defaults__", (block_bytes,)
        )
        out = tmp_path / f"out{processes}"
        tokenize_datasets(tmp_path / "in", out, tokenizer, TokenizeOptions(), processes=processes)
        results.append(
            {
                path.relative_to(out): path.read_bytes()
                for path in out.rglob("*")
                if path.is_file() and path.name != "done.json"
            }
        )
    # For each dataset: the .bin, its meta file, the manifest and the stats.
    assert len(results[0]) == 8
    assert results[0] == results[1] == results[2]


def test_line_ends_and_byte_order_mark(tmp_path):
    tokenizer = small_tokenizer("byte_level")
    lines = [json.dumps([{"role": "user", "content": str(number)}]).encode() for number in range(4)]
    plain, odd = tmp_path / "plain", tmp_path / "odd"
    for root, data in ((plain, b"\n".join(lines)), (odd, b"\xef\xbb\xbf%b\r\n%b\r%b\n%b\r\n" % tuple(lines))):
        source = root / "d" / "processed" / "f.jsonl"
        source.parent.mkdir(parents=True)
        source.write_bytes(data)
        tokenize_datasets(root, root / "out", tokenizer, TokenizeOptions())
    name = "out/chatml_llamav13_32k/train/cn/d/f.bin"
    assert (plain / name).read_bytes() == (odd / name).read_bytes()
    assert (plain / name).read_bytes().count(b"\n") == 4


def test_real_conversations(tmp_path, shared_data):
    from snaketune.encoding.base_tokenizer import open_tokenizer

    tokenizer = open_tokenizer(shared_data / "mistral_v1_tokenizer", tmp_path / "tokenizer")
    tokenize_datasets(shared_data / "ftdp", tmp_path / "out", tokenizer, TokenizeOptions(), processes=2)
    for dataset, (source,) in find_datasets(shared_data / "ftdp").items():
        batch = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        expected = bin_and_meta(batch, encoder_of(tokenizer), tokenizer.bos_token_id)
        file = tmp_path / "out" / "chatml_llamav13_32k" / "train" / "cn" / dataset / f"{source.stem}.bin"
        assert file.read_bytes() == expected["train"][0]
        assert file.with_name(f"{file.name}.meta").read_bytes() == expected["train"][1]
