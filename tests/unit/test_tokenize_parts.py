"""Parts of a tokenisation: they give the bytes of a single job, and only missing parts are redone."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
from ftdp_small_tokenizers import extended_folder, small_tokenizer
from test_tokenize_runs import files_below, random_lines, write_dataset

from snaketune.chat_files.processed_layout import find_datasets
from snaketune.chat_files.range_reader import RangeReader, lines_before
from snaketune.common.cli import UserError
from snaketune.tokenized import chunk_store
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.job_parts import file_sizes, split_parts
from snaketune.tokenized.tokenizing import merge_parts, tokenize_datasets, tokenize_part

DEFAULT = TokenizeOptions()
SMALL = {"shard_bytes": 100_000, "batch_bytes": 30_000}


def parts_of(processed, **sizes):
    datasets = find_datasets(processed)
    return split_parts(datasets, file_sizes(datasets), **(sizes or SMALL))


def in_parts(processed, out, tokenizer, options=DEFAULT, names=None, **sizes):
    """Tokenises part by part, in shuffled order, and merges."""
    names = names or list(parts_of(processed, **sizes))
    random.Random(1).shuffle(names)
    said = [tokenize_part(processed, out, tokenizer, options, name, **(sizes or SMALL)) for name in names]
    merge_parts(processed, out, tokenizer, options)
    return dict(zip(names, said, strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer("byte_level")


@pytest.fixture
def processed(tmp_path):
    root = tmp_path / "in"
    write_dataset(root, "large", random_lines(1500, 1))
    for number in range(12):
        write_dataset(root, f"small {number}", random_lines(20, number), f"f{number}.jsonl")
    write_dataset(root, "small 3", [], "empty.jsonl")
    return root


def test_ranges_give_each_line_once(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "f.jsonl"
    for _ in range(60):
        ends = rng.choices([b"\n", b"\r\n", b"\r", b"\n\n"], k=12)
        data = b"".join(b"x" * rng.choice([0, 1, 3, 40]) + end for end in ends)
        data = rng.choice([b"", b"\xef\xbb\xbf"]) + data + rng.choice([b"", b"last", b"\xef\xbb\xbf"])
        path.write_bytes(data)

        def lines(start, end):
            with RangeReader(path, start, end) as reader:
                return [line for block in reader for line in block.lines], reader.bytes_read

        whole, _ = lines(0, None)
        cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randint(0, 6)))
        ranges = list(zip([0, *cuts], [*cuts, len(data)], strict=True))
        pieces = [lines(*each) for each in ranges]
        assert [line for piece, _ in pieces for line in piece] == whole
        assert sum(size for _, size in pieces) == len(data)
        for (start, _), before in zip(ranges, range(len(pieces)), strict=True):
            if pieces[before][0]:
                assert lines_before(path, start) == sum(len(piece) for piece, _ in pieces[:before])


def test_the_plan(processed):
    parts = parts_of(processed)
    size = (processed / "large/processed/sft_chat/f.jsonl").stat().st_size
    ranges = [chunk for part in parts.values() for chunk in part if chunk.dataset == "large"]
    assert [(chunk.index, chunk.count) for chunk in ranges] == [(i, len(ranges)) for i in range(len(ranges))]
    assert len(ranges) == -(-size // 100_000)
    batches = {name: part for name, part in parts.items() if name.startswith("batch-")}
    assert 1 < len(batches) < 13
    assert sum(len(part) for part in batches.values()) == 13
    assert all("/" not in name and " " not in name for name in parts)
    # A new file changes only its own batch.
    write_dataset(processed, "small 99", random_lines(5))
    more = parts_of(processed)
    assert sum(parts[name] != more[name] for name in batches) <= 1


def test_five_thousand_folders_are_a_few_jobs(tmp_path):
    datasets = {f"d{number}": [tmp_path / f"d{number}" / "f.jsonl"] for number in range(5000)}
    sizes = {files[0]: 10_000 for files in datasets.values()}
    assert len(split_parts(datasets, sizes)) == 1
    assert len(split_parts(datasets, dict.fromkeys(sizes, 1_000_000))) <= 128


@pytest.mark.parametrize(
    "options",
    [
        TokenizeOptions(),
        TokenizeOptions(valid="holdout", valid_share=0.1, heldout_share=0.1),
        TokenizeOptions(on_bad_sample="quarantine", max_bad_share=0.2),
    ],
    ids=["copy", "holdout", "quarantine"],
)
def test_parts_give_the_bytes_of_one_job(tmp_path, processed, tokenizer, options):
    file = processed / "large/processed/sft_chat/f.jsonl"
    if options.on_bad_sample == "quarantine":
        lines = file.read_bytes().splitlines(keepends=True)
        for number in range(7, len(lines), 50):
            lines[number] = b"not \xff JSON %d\n" % number
        file.write_bytes(b"".join(lines))
    tokenize_datasets(processed, tmp_path / "one", tokenizer, options)
    in_parts(processed, tmp_path / "parts", tokenizer, options)
    one = files_below(tmp_path / "one")
    assert files_below(tmp_path / "parts") == one
    manifest = json.loads(one["manifests/large.json"])
    totals = manifest["totals"]
    moved = totals["valid_samples"] if options.valid == "holdout" else 0
    assert totals["lines"] == totals["samples"] + moved + totals["heldout"] + totals["quarantined"] == 1500
    if options.valid == "holdout":
        assert moved > 100
    if options.on_bad_sample == "quarantine":
        bad = [json.loads(line) for line in one["manifests/large/f.quarantine.jsonl"].splitlines()]
        assert [each["line"] for each in bad] == list(range(8, 1501, 50))
        assert totals["quarantined"] == len(bad) == 30


@pytest.mark.slow
def test_the_valid_copy_counts_over_the_whole_file(tmp_path, tokenizer):
    line = next(random_lines(1, words=2))
    write_dataset(tmp_path / "in", "d", [line] * 50_150)
    write_dataset(tmp_path / "in", "e", [line] * 50_050)
    options = TokenizeOptions()
    tokenize_datasets(tmp_path / "in", tmp_path / "one", tokenizer, options)
    sizes = {"shard_bytes": 900_000, "batch_bytes": 100}
    in_parts(tmp_path / "in", tmp_path / "parts", tokenizer, options, **sizes)
    one = files_below(tmp_path / "one")
    assert files_below(tmp_path / "parts") == one
    valid = "chatml_llamav13_32k/valid/cn/{}/f.bin"
    assert one[valid.format("d")].count(b"\n") == 501
    assert valid.format("e") not in one
    # With `valid: none`, only the old copies are removed.
    none = TokenizeOptions(valid="none")
    tokenize_datasets(tmp_path / "in", tmp_path / "one", tokenizer, none)
    in_parts(tmp_path / "in", tmp_path / "parts", tokenizer, none, **sizes)
    without = files_below(tmp_path / "one")
    assert files_below(tmp_path / "parts") == without
    bins = {name for name in one if name.endswith((".bin", ".meta"))}
    assert {name for name in without if name in bins} == {name for name in bins if "/valid/" not in name}
    assert all(without[name] == one[name] for name in bins if "/valid/" not in name)


def test_only_what_changed_is_done_again(tmp_path, processed, tokenizer):
    out = tmp_path / "out"
    in_parts(processed, out, tokenizer)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")}
    touched = processed / "small 1/processed/sft_chat/f1.jsonl"
    os.utime(touched)
    edited = processed / "small 2/processed/sft_chat/f2.jsonl"
    edited.write_text("".join(random_lines(21, 77)), encoding="utf-8")
    in_parts(processed, out, tokenizer)
    changed = [path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp]
    assert [path.name for path in changed] == ["f2.bin"]
    tokenize_datasets(processed, tmp_path / "one", tokenizer, TokenizeOptions())
    assert files_below(out) == files_below(tmp_path / "one")


def test_a_range_is_done_again_when_it_must(tmp_path, processed, tokenizer):
    out = tmp_path / "out"
    names = [name for name in parts_of(processed) if name.startswith("large")]
    for name in names[:-1]:
        tokenize_part(processed, out, tokenizer, TokenizeOptions(), name, **SMALL)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.train.bin")}
    assert len(stamps) == len(names) - 1
    with pytest.raises(UserError, match="part 8 of|is not tokenised"):
        merge_parts(processed, out, tokenizer, TokenizeOptions())
    for name in names:
        tokenize_part(processed, out, tokenizer, TokenizeOptions(), name, **SMALL)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


@pytest.mark.parametrize("how", ["other options", "other tokenizer", "changed bin", "lost bin", "bad record"])
def test_nothing_wrong_is_reused(tmp_path, processed, tokenizer, how):
    out, options = tmp_path / "out", TokenizeOptions()
    tokenize_datasets(processed, out, tokenizer, options)
    bin_file = out / "chatml_llamav13_32k/train/cn/small 5/f5.bin"
    if how == "other options":
        options = TokenizeOptions(max_length=9)
    elif how == "other tokenizer":
        tokenizer = small_tokenizer("sentencepiece")
    elif how == "changed bin":
        bin_file.write_bytes(bin_file.read_bytes().replace(b"1", b"2"))
    elif how == "lost bin":
        bin_file.unlink()
    else:
        (out / "chunks/small 5/f5/done.json").write_text("{")
    with pytest.raises(UserError, match="is not tokenised, or has changed"):
        merge_parts(processed, out, tokenizer, options)
    tokenize_datasets(processed, out, tokenizer, options)
    tokenize_datasets(processed, tmp_path / "fresh", tokenizer, options)
    assert files_below(out) == files_below(tmp_path / "fresh")


def test_an_edit_that_keeps_size_and_time_is_found_when_the_stamp_was_fresh(tmp_path, tokenizer):
    lines = list(random_lines(10))
    write_dataset(tmp_path / "in", "d", lines)
    tokenize_datasets(tmp_path / "in", tmp_path / "out", tokenizer, TokenizeOptions())
    file = tmp_path / "in/d/processed/sft_chat/f.jsonl"
    stat = file.stat()
    write_dataset(tmp_path / "in", "d", lines[::-1])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    tokenize_datasets(tmp_path / "in", tmp_path / "out", tokenizer, TokenizeOptions())
    tokenize_datasets(tmp_path / "in", tmp_path / "fresh", tokenizer, TokenizeOptions())
    assert files_below(tmp_path / "out") == files_below(tmp_path / "fresh")


def test_a_bad_line_in_a_late_range_has_its_number_in_the_file(tmp_path, processed, tokenizer):
    file = processed / "large/processed/sft_chat/f.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[1321] = "[1]\n"
    file.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"f\.jsonl:1322"):
        in_parts(processed, tmp_path / "out", tokenizer)


def test_a_removed_dataset_goes_where_the_folder_is_ours(tmp_path, processed, tokenizer):
    out = tmp_path / "out"
    in_parts(processed, out, tokenizer)
    shutil.rmtree(processed / "small 0")
    merge_parts(processed, out, tokenizer, TokenizeOptions(), prune=True)
    tokenize_datasets(processed, tmp_path / "one", tokenizer, TokenizeOptions())
    assert files_below(out) == files_below(tmp_path / "one")


def test_the_command(tmp_path, processed, run_script):
    common = ["--processed-dir", processed, "--tokenized-dir", tmp_path / "out"]
    common += ["--tokenizer-path", extended_folder(), "--threads", 1]
    name = "batch-0001-of-0001"
    run_script("tokenize_dataset.py", *common, "--part", name, "--marker", tmp_path / "m.json")
    assert len(json.loads((tmp_path / "m.json").read_text())["chunks"]) == 14
    done = run_script("tokenize_dataset.py", *common, "--merge", "--index", tmp_path / "index.json")
    assert "large: 1500 documents" in done.stdout
    assert len(json.loads((tmp_path / "index.json").read_text())["datasets"]) == 13
    failed = run_script("tokenize_dataset.py", *common, "--part", "nope", check=False)
    assert failed.returncode == 2 and "there is no part 'nope'" in failed.stderr


def test_a_time_stamp_costs_one_look(tmp_path, processed, tokenizer, monkeypatch):
    in_parts(processed, tmp_path / "out", tokenizer)
    for path in [*processed.rglob("*.jsonl"), *(tmp_path / "out").rglob("*.bin")]:
        os.utime(path, (1, 1))  # as after a copy
    said = in_parts(processed, tmp_path / "out", tokenizer)
    assert all("were already done" in each and "documents" not in each for each in said.values())
    for function in ("RangeReader", "sha256_file"):  # from now on no file may be read
        monkeypatch.delattr(chunk_store, function)
    assert in_parts(processed, tmp_path / "out", tokenizer) == said
