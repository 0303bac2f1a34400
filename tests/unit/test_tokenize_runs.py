"""The tokenise command as a whole: the guide's call, kill -9 at any time, memory, and unusual names."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
from ftdp_reference import bin_and_meta
from ftdp_small_tokenizers import extended_folder, small_tokenizer

from snaketune.encoding.tokenizer import load_tokenizer
from snaketune.tokenized.bin_reader import TokenizedFile
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.data_order import list_train_files
from snaketune.tokenized.tokenizing import tokenize_datasets

pytestmark = pytest.mark.slow

WORDS = ["hello", "world", "你好", "x = 1", "12 * 7", "\n", "name", "{}"]


def random_lines(count, seed=0, words=40):
    rng = random.Random(seed)
    for _ in range(count):
        question, answer = (" ".join(rng.choices(WORDS, k=rng.randint(1, words))) for _ in range(2))
        conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield json.dumps(conversation, ensure_ascii=False) + "\n"


def write_dataset(root, name, lines, file="f.jsonl"):
    source = root / name / "processed" / "sft_chat" / file
    source.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "w", encoding="utf-8") as stream:
        stream.writelines(lines)


def files_below(folder):
    """Returns all files except the chunk records, which contain mtimes."""
    files = [path for path in folder.rglob("*") if path.is_file() and "chunks" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_guides_command(tmp_path, run_script, tiny_tokenizer_dir):
    strange = "数据 1'\";$(x)"
    write_dataset(tmp_path / "in", "plain", random_lines(30))
    write_dataset(tmp_path / "in", strange, random_lines(5, 1), "g h.v2.jsonl")
    done = run_script(
        "tokenize_dataset.py",
        *("--processed-dir", tmp_path / "in", "--tokenized-dir", tmp_path / "out"),
        *("--tokenizer-path", tiny_tokenizer_dir),
        *("--tokenizer-w-special-tokens-save-dir", tmp_path / "tokenizer"),
    )
    assert "35 documents" in done.stdout
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert len(tokenizer.added) == 6
    root = tmp_path / "out" / "chatml_llamav13_32k"
    assert list_train_files(root / "train") == ["cn/plain/f.bin", f"cn/{strange}/g h.v2.bin"]
    assert sorted(path.name for path in (root / "valid" / "cn").iterdir()) == ["plain", strange]

    def encode(text):
        return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids

    expected = bin_and_meta([json.loads(line) for line in random_lines(5, 1)], encode, tokenizer.bos_token_id)
    assert (root / "train" / "cn" / strange / "g h.v2.bin").read_bytes() == expected["train"][0]
    manifest = json.loads((tmp_path / "out" / "manifests" / f"{strange}.json").read_text(encoding="utf-8"))
    assert manifest["files"][0]["source"] == f"{strange}/processed/sft_chat/g h.v2.jsonl"
    assert manifest["tokenizer_sha256"] == tokenizer.sha256
    assert sum(manifest["length_histogram"]["counts"]) == manifest["totals"]["samples"] == 5
    assert TokenizedFile(root / "train" / "cn" / "plain" / "f.bin").lengths.max() < 400

    # The tokenizer is already extended: no save folder is needed, and the bytes are the same.
    run_script(
        "tokenize_dataset.py",
        *("--processed-dir", tmp_path / "in", "--tokenized-dir", tmp_path / "again"),
        *("--tokenizer-path", tmp_path / "tokenizer", "--dataset", "plain", "--threads", 1),
    )
    name = "chatml_llamav13_32k/train/cn/plain/f.bin"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    name = "manifests/plain.json"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_small_dataset_before_a_large_one(tmp_path, run_script):
    # The small dataset is tokenised without workers. This must not disturb the workers forked later.
    write_dataset(tmp_path / "in", "a", random_lines(3))
    write_dataset(tmp_path / "in", "b", random_lines(4000))
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    done = run_script(
        *("tokenize_dataset.py", "--processed-dir", tmp_path / "in", "--tokenized-dir", tmp_path / "out"),
        *("--tokenizer-path", extended_folder(), "--threads", 2),
        env=environment,
    )
    assert "fork" not in done.stderr and "arning" not in done.stderr
    assert "4,003 documents" in done.stdout


@pytest.mark.parametrize("moments", [(0.0, 0.05, 0.15), (0.3, 0.5, 0.8)])
def test_kill_and_run_again(tmp_path, repo_root, moments):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.symlink_to(extended_folder())
    write_dataset(tmp_path / "in", "a", random_lines(12_000))
    write_dataset(tmp_path / "in", "b", random_lines(100, 1))
    command = [
        *(sys.executable, str(repo_root / "workflow_scripts" / "tokenize_dataset.py")),
        *("--processed-dir", str(tmp_path / "in"), "--tokenizer-path", str(tokenizer), "--threads", "2"),
    ]
    whole = [*command, "--tokenized-dir", str(tmp_path / "whole")]
    start = time.monotonic()
    subprocess.run(whole, check=True, capture_output=True)
    seconds = time.monotonic() - start
    expected = files_below(tmp_path / "whole")
    out = tmp_path / "killed"
    for share in moments:
        process = subprocess.Popen(
            [*command, "--tokenized-dir", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(0.1 + share * seconds)
        process.kill()
        process.wait()
        left = files_below(out) if out.exists() else {}
        for name, data in left.items():
            if not name.endswith(".tmp"):
                assert data == expected[name], f"{name} looks finished and is not"
        for name in left:
            # manifests/<dataset>.json, but not the statistics in manifests/<dataset>/
            found = re.fullmatch(r"manifests/([^/]+)\.json", name)
            if found:
                assert f"chatml_llamav13_32k/train/cn/{found[1]}/f.bin" in left
    subprocess.run([*command, "--tokenized-dir", str(out)], check=True, capture_output=True)
    assert files_below(out) == expected


def test_a_changed_source_leaves_nothing_old(tmp_path):
    tokenizer = small_tokenizer("byte_level")
    write_dataset(tmp_path / "in", "d", random_lines(10), "old.jsonl")
    tokenize_datasets(tmp_path / "in", tmp_path / "out", tokenizer, TokenizeOptions())
    (tmp_path / "in" / "d" / "processed" / "sft_chat" / "old.jsonl").unlink()
    write_dataset(tmp_path / "in", "d", random_lines(3), "new.jsonl")
    tokenize_datasets(tmp_path / "in", tmp_path / "out", tokenizer, TokenizeOptions())
    assert list_train_files(tmp_path / "out" / "chatml_llamav13_32k" / "train") == ["cn/d/new.bin"]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_does_not_grow_with_the_file(tmp_path, repo_root, threads):
    peaks = []
    for size in (1, 10):
        root = tmp_path / f"in{size}"
        write_dataset(root, "d", (line for _ in range(size) for line in random_lines(4000)))
        code = (
            "import resource, sys\nsys.argv = ['x', *sys.argv[1:]]\nimport tokenize_dataset\ntokenize_dataset.main()\n"
            "print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))"
        )
        arguments = [
            "--processed-dir",
            root,
            "--tokenized-dir",
            tmp_path / f"out{size}",
            "--threads",
            threads,
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, [*arguments, "--tokenizer-path", extended_folder()])],
            cwd=repo_root / "workflow_scripts",
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0], f"KiB for a file and one that is 10 times larger: {peaks}"
