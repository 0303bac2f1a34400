"""Checks the stats of a dataset against a separate count."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from ftdp_small_tokenizers import small_tokenizer

from snaketune.common.files import read_json
from snaketune.reporting.data_summary import data_summary, load_dataset
from snaketune.tokenized import stats
from snaketune.tokenized.bin_reader import read_line
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.layout import stats_path
from snaketune.tokenized.tokenizing import merge_parts, tokenize_datasets


@pytest.fixture
def tokenized(tmp_path):
    """Tokenises two files of one dataset, with long, cut, held-out and bad lines."""
    rng = random.Random(3)
    for name in ("a", "b"):
        lines = []
        for number in range(150):
            text = "word " * rng.choice([1, 1, 2, 5, 40, 90])
            lines.append(json.dumps([{"role": "user", "content": f"{name}{number} {text}"}]).encode())
        lines[7] = b"oops"
        lines[9] = b'[{"role": "bot", "content": ""}]'
        lines[11] = b'[{"role": "user", "content": ""}, {"role": "elf", "content": ""}]'
        file = tmp_path / "in" / "d" / "processed" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\n".join(lines))
    options = TokenizeOptions(
        max_length=100, heldout_share=0.1, on_bad_sample="quarantine", max_bad_share=0.05
    )
    tokenize_datasets(tmp_path / "in", tmp_path / "out", small_tokenizer("byte_level"), options)
    return tmp_path / "out"


def by_hand(out):
    places = []
    for name in ("a", "b"):
        path = f"chatml_llamav13_32k/train/cn/d/{name}.bin"
        for number, line in enumerate((out / path).read_bytes().splitlines()):
            places.append((len(json.loads(line)["tokens"]), path, number))
    return places


def test_stats_lie_beside_the_manifest(tokenized):
    manifest = tokenized / "manifests" / "d.json"
    assert stats_path(manifest) == tokenized / "manifests" / "d" / "stats.json"
    found = read_json(stats_path(manifest))
    assert found == stats.dataset_stats(read_json(manifest), tokenized, 0)
    places = by_hand(tokenized)
    lengths = [tokens for tokens, *_ in places]
    assert found["samples"] == len(lengths)
    assert found["samples"] + found["heldout"] + found["quarantined"] == 300
    assert found["quarantined"] == 6
    assert found["bad_lines"] == {"invalid [n].role": 4, "not JSON": 2}
    quarantine = "manifests/d/a.quarantine.jsonl"
    assert found["files"][0]["quarantine"] == quarantine and (tokenized / quarantine).is_file()
    assert found["truncated"] == lengths.count(100) > 0
    longest = sorted(places, key=lambda place: (-place[0], place[1:]))[:10]
    assert [(each["tokens"], each["bin"], each["sample"]) for each in found["longest_samples"]] == longest
    for each in found["longest_samples"]:
        line = (tokenized.parent / "in" / each["source"]).read_bytes().splitlines()[each["line"] - 1]
        ids = json.loads((tokenized / each["bin"]).read_bytes().splitlines()[each["sample"]])["tokens"]
        text = small_tokenizer("byte_level").tokenizer.decode([abs(token) for token in ids])
        assert json.loads(line)[0]["content"].split()[0] in text.split()
    assert found["lengths"] == {
        "mean": round(float(np.mean(lengths)), 2),
        **{f"p{p}": int(np.percentile(lengths, p, method="inverted_cdf")) for p in (50, 90, 95, 99)},
        "shortest": min(lengths),
        "longest": max(lengths),
    }
    assert [file["samples"] for file in found["files"]] == [
        sum(path.endswith(name) for _, path, _ in places) for name in ("a.bin", "b.bin")
    ]


def test_pieces_of_a_meta_file_make_no_difference(tokenized, monkeypatch):
    manifest = read_json(tokenized / "manifests" / "d.json")
    whole = stats.dataset_stats(manifest, tokenized, None)
    monkeypatch.setattr(stats, "_ROWS", 7)
    assert stats.dataset_stats(manifest, tokenized, None) == whole


def test_an_empty_dataset(tmp_path):
    file = tmp_path / "in" / "d" / "processed" / "f.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    tokenize_datasets(tmp_path / "in", tmp_path / "out", small_tokenizer("byte_level"), TokenizeOptions())
    found = read_json(tmp_path / "out" / "manifests" / "d" / "stats.json")
    assert found["samples"] == 0 and found["longest_samples"] == []
    assert set(found["lengths"].values()) == {None}


LIMIT = 60


def write_talks(folder):
    """Writes questions of 1 to 90 words with answers, some of them not trained on, and monologues without answers."""
    rng = random.Random(5)
    lines = []
    for number in range(120):
        talk = [{"role": "user", "content": f"{number} " + "word " * rng.choice([1, 20, 35, 90])}]
        if number % 4:
            talk.append(
                {"role": "assistant", "content": "yes " * rng.choice([1, 30]), "loss": number % 3 > 0}
            )
        lines.append(json.dumps(talk))
    file = folder / "d" / "processed" / "f.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines))
    return folder


def trained(folder):
    """Returns, for each tokenised document, which tokens after the first are trained on."""
    file = folder / "chatml_llamav13_32k" / "train" / "cn" / "d" / "f.bin"
    return [read_line(line)[1][1:] >= 0 for line in file.read_bytes().splitlines()]


@pytest.mark.parametrize("mask", ["exact", "compat"])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_conversations_that_lose_all_their_trained_tokens_are_counted(tmp_path, kind, mask):
    source = write_talks(tmp_path / "in")
    tokenizer, warnings = small_tokenizer(kind), []
    for limit, shard_bytes in ((LIMIT, 1 << 30), (10**6, 1 << 30), (LIMIT, 2000)):
        out = tmp_path / f"{limit}-{shard_bytes}"
        made = tokenize_datasets(
            source, out, tokenizer, TokenizeOptions(max_length=limit, mask=mask), shard_bytes=shard_bytes
        )
        warnings.append(stats.untrained_warning(out / "manifests" / "d.json"))
        assert stats.UNTRAINED not in json.dumps(made), "digests of the same data stay the same"
    cut, whole = trained(tmp_path / f"{LIMIT}-{1 << 30}"), trained(tmp_path / f"{10**6}-{1 << 30}")
    lost = sum(before.any() and not after.any() for before, after in zip(whole, cut, strict=True))
    never = sum(not before.any() for before in whole)
    assert lost > 5 and never > 5
    for name, expected in ((f"{LIMIT}-{1 << 30}", lost), (f"{10**6}-{1 << 30}", 0), (f"{LIMIT}-2000", lost)):
        assert read_json(tmp_path / name / "manifests" / "d" / "stats.json")[stats.UNTRAINED] == expected
    folder = tmp_path / f"{LIMIT}-{1 << 30}" / "chatml_llamav13_32k" / "train" / "cn" / "d"
    assert warnings[0].startswith(f"warning: {folder}: {lost} of ") and "raise data.max_tokens" in warnings[0]
    assert warnings[1] is None


def test_tokenised_data_of_an_earlier_release_do_not_tell_and_are_kept(tmp_path):
    source, out = write_talks(tmp_path / "in"), tmp_path / "out"
    arguments = (source, out, small_tokenizer("byte_level"), TokenizeOptions(max_length=LIMIT))
    before = tokenize_datasets(*arguments)
    record, found = out / "chunks/d/f/done.json", out / "manifests/d/stats.json"
    old = read_json(record)
    assert old["result"]["tally"].pop("untrained") > 0
    record.write_text(json.dumps(old))
    bytes_before = record.read_bytes()
    # Its stats lack the number.
    known = read_json(found)
    del known[stats.UNTRAINED]
    found.write_text(json.dumps(known))
    assert merge_parts(*arguments) == before
    assert stats.UNTRAINED not in read_json(found) and record.read_bytes() == bytes_before
    manifest = out / "manifests/d.json"
    assert stats.untrained_warning(manifest) is None
    assert data_summary([load_dataset(manifest)])["untrained"] == ([], 0)
    # Written again, they say that it is not known.
    found.unlink()
    assert merge_parts(*arguments) == before
    assert read_json(found)[stats.UNTRAINED] is None and record.read_bytes() == bytes_before
    assert stats.untrained_warning(manifest) is None
    assert data_summary([load_dataset(manifest)])["untrained"] == ([], 0)
