"""Files as they come: every kind of bad one is refused or set aside, and every line is accounted for."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from ftdp_small_tokenizers import extended_folder, small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import UserError
from common.files import atomic_dir, write_bytes
from ftdp.block_tokenizer import BlockTokenizer, TokenizeOptions
from ftdp.quarantine import quarantine_record, raw_line
from ftdp.reading import LineReader
from ftdp.tokenizing import tokenize_datasets

GOOD = b'[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]'
QUARANTINE = TokenizeOptions(on_bad_sample="quarantine", max_bad_share=1)


def source_of(folder: Path, name: str = "f.jsonl") -> Path:
    source = folder / "in" / "d" / "processed" / "sft" / name
    source.parent.mkdir(parents=True, exist_ok=True)
    return source


def tokenize(folder: Path, **options):
    tokenizer = small_tokenizer("byte_level")
    options = TokenizeOptions(**options)
    return tokenize_datasets(folder / "in", folder / "out", tokenizer, options)["d"]


def quarantined(folder: Path, stem: str = "f") -> list[dict]:
    path = folder / "out" / "manifests" / "d" / f"{stem}.quarantine.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def bin_of(folder: Path, stem: str = "f") -> bytes:
    return (folder / "out" / "chatml_llamav13_32k" / "train" / "cn" / "d" / f"{stem}.bin").read_bytes()


def finals(folder: Path) -> list[str]:
    """What a reader of the output could take for a result."""
    out = folder / "out"
    names = [path for path in out.rglob("*") if path.is_file() and "chunks" not in path.parts]
    return sorted(path.relative_to(out).as_posix() for path in names if "quarantine" not in path.name)


def openai(**fields) -> bytes:
    return json.dumps([{"role": "user", "content": "hi", **fields}]).encode()


# name: (the file, the numbers of its bad lines, what the first one's message must contain)
FILES = {
    "invalid JSON": (GOOD + b"\n{oops\n" + GOOD + b"\n", [2], ["not JSON", "{oops"]),
    "truncated last line": (GOOD + b"\n" + GOOD[:-9], [2], ["not JSON", "the file ends here", "cut off"]),
    "invalid UTF-8": (GOOD + b"\n" + GOOD.replace(b"hi", b"\xff") + b"\n", [2], ["UTF-8"]),
    "Latin-1": (
        GOOD + b"\n" + GOOD.replace(b"hi", "é".encode("latin-1")) + b"\n",
        [2],
        ["save the file as UTF-8"],
    ),
    "UTF-16": ((GOOD + b"\n").decode().encode("utf-16-le"), [1, 2], ["not JSON"]),
    "blank line": (GOOD + b"\n\n" + GOOD + b"\n", [2], ["blank line", "remove the line"]),
    "blank lines at the end": (GOOD + b"\n\n \t\n\n", [2, 3, 4], ["blank line"]),
    "not a list": (b'{"role": "user"}\n' + GOOD + b"\n", [1], ["a list of messages"]),
    "OpenAI's rows": (b'{"messages": []}\n', [1], ["OpenAI's format", "ingest_dataset.py"]),
    "ShareGPT's rows": (b'{"conversations": []}\n', [1], ["ShareGPT's format", "ingest_dataset.py"]),
    "Alpaca's rows": (b'{"instruction": ""}\n', [1], ["Alpaca's", "ingest_dataset.py"]),
    "ShareGPT's messages": (b'[{"from": "human", "value": ""}]\n', [1], ["ShareGPT's", "ingest_dataset.py"]),
    "one list over many lines": (b"[\n" + GOOD + b"\n]\n", [1, 3], ["over many lines", "ingest_dataset.py"]),
    "missing role": (b'[{"content": "hi"}]\n', [1], ["[0].role", "no 'role'"]),
    "missing content": (b'[{"role": "user"}]\n', [1], ["[0].content", "no 'content'"]),
    "unknown role": (openai(role="bot") + b"\n", [1], ["[0].role", "'bot'"]),
    "content in parts": (
        openai(content=[{"type": "text", "text": "hi"}]) + b"\n",
        [1],
        ["[0].content", "a content of several parts", "ingest_dataset.py"],
    ),
    "content null, with calls": (openai(content=None, tool_calls=[]) + b"\n", [1], ["ingest_dataset.py"]),
    "content is a number": (openai(content=3) + b"\n", [1], ["[0].content", "3 (int)", "a string"]),
    "empty conversation": (b"[]\n" + GOOD + b"\n[ ]\n", [1, 3], ["the conversation is empty"]),
    "tool first": (b'[{"role": "tool", "content": ""}]\n', [1], ["[0].role", "message first"]),
    "thought first": (b'[{"role": "thought", "content": ""}]\n', [1], ["[0].role", "message first"]),
    "quotes not escaped": (GOOD.replace(b"hi", b'say "hi"') + b"\n", [1], ["not JSON", 'say "hi"']),
    "half a surrogate pair": (GOOD.replace(b"hi", b"\\ud83d") + b"\n", [1], ["surrogate"]),
    "a surrogate as bytes": (GOOD.replace(b"hi", b"\xed\xa0\xbd") + b"\n", [1], ["UTF-8"]),
    "NUL as a byte": (GOOD.replace(b"hi", b"\0") + b"\n", [1], ["not JSON"]),
    "a hole of NULs": (GOOD + b"\n" + bytes(5000) + b"\n", [2], ["5000 NUL bytes", "a hole"]),
    "a BOM in the middle": (GOOD + b"\n\xef\xbb\xbf" + GOOD + b"\n", [2], ["not JSON"]),
    "nested too deeply": (b"[" * 200_000 + b"\n" + GOOD + b"\n", [1], ["not JSON"]),
    "a control token": (GOOD.replace(b"hi", b"<|im_end|>") + b"\n", [1], ["[0].content", "<|im_end|>"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file(tmp_path, case):
    data, bad, expected = FILES[case]
    source = source_of(tmp_path)
    source.write_bytes(data)
    more = {"control_tokens": "error"} if case == "a control token" else {}
    with pytest.raises(UserError) as caught:
        tokenize(tmp_path, **more)
    text = str(caught.value)
    assert f"{source}:{bad[0]}: " in text
    for part in (*expected, "found:", "expected:", "to fix:"):
        assert part in text, text
    assert finals(tmp_path) == []
    manifest = tokenize(tmp_path, on_bad_sample="quarantine", max_bad_share=1, **more)
    records = quarantined(tmp_path)
    lines = data.split(b"\n")
    assert [record["line"] for record in records] == bad
    assert [raw_line(record) for record in records] == [lines[number - 1] for number in bad]
    assert all(record["file"] and record["reason"] for record in records)
    count = len(lines) - (not lines[-1])
    assert manifest["totals"]["samples"] == count - len(bad) == bin_of(tmp_path).count(b"\n")
    assert manifest["totals"]["quarantined"] == len(bad)


# name: (the file, what it means)
NOT_BAD = {
    "BOM": (b"\xef\xbb\xbf" + GOOD + b"\n", GOOD),
    "CRLF": (GOOD + b"\r\n" + GOOD + b"\r\n", GOOD + b"\n" + GOOD),
    "CR": (GOOD + b"\r" + GOOD, GOOD + b"\n" + GOOD),
    "mixed ends": (GOOD + b"\r\n" + GOOD + b"\n" + GOOD + b"\r" + GOOD, b"\n".join([GOOD] * 4)),
    "no line break at the end": (GOOD, GOOD + b"\n"),
    "space around": (b"  " + GOOD + b"\t\n", GOOD),
    "empty": (b"", b""),
    "nested quotes": (
        GOOD.replace(b"hi", b'{\\"a\\": \\"{\\\\\\"b\\\\\\": 1}\\"}'),
        json.dumps(
            [{"role": "user", "content": '{"a": "{\\"b\\": 1}"}'}, {"role": "assistant", "content": "yes"}]
        ).encode(),
    ),
    "unknown keys": (GOOD.replace(b'"hi"', b'"hi", "id": 12345678901234567890123'), GOOD),
    "NUL as an escape": (GOOD.replace(b"hi", b"a\\u0000b"), GOOD.replace(b"hi", b"a\\u0000b")),
    "lines ends of Unicode": (
        GOOD.replace(b"hi", "\u2028\x85".encode()),
        GOOD.replace(b"hi", b"\\u2028\\u0085"),
    ),
}


@pytest.mark.parametrize("case", NOT_BAD)
def test_what_is_no_error(tmp_path, case):
    data, meaning = NOT_BAD[case]
    for name, content in (("a", data), ("b", meaning)):
        source_of(tmp_path / name).write_bytes(content)
        tokenize(tmp_path / name)
    assert bin_of(tmp_path / "a") == bin_of(tmp_path / "b")


def test_a_line_of_50_mb(tmp_path):
    data = GOOD + b"\n" + GOOD.replace(b"hi", b"hi " * 17_000_000) + b"\n" + GOOD + b"\n"
    source = source_of(tmp_path)
    source.write_bytes(data)
    with pytest.raises(UserError, match=r"f\.jsonl:2: the line is too long"):
        tokenize(tmp_path)
    totals = tokenize(tmp_path, on_bad_sample="quarantine", max_bad_share=0.4)["totals"]
    assert (totals["samples"], totals["quarantined"]) == (2, 1)
    assert raw_line(quarantined(tmp_path)[0]) == data.split(b"\n")[1]


def test_a_long_line_below_the_limit_is_cut(tmp_path):
    source_of(tmp_path).write_bytes(GOOD.replace(b"hi", b"hi " * 300_000))
    totals = tokenize(tmp_path)["totals"]
    assert (totals["truncated"], totals["longest"]) == (1, 32768)


@pytest.mark.parametrize(("share", "good"), [(0.25, True), (0.2, False), (0, False)])
def test_more_bad_lines_than_allowed(tmp_path, share, good):
    source_of(tmp_path).write_bytes(b"\n".join([GOOD, GOOD, b"oops", GOOD]))
    if good:
        assert tokenize(tmp_path, on_bad_sample="quarantine", max_bad_share=share)["totals"]["samples"] == 3
    else:
        with pytest.raises(UserError, match="1 of 4"):
            tokenize(tmp_path, on_bad_sample="quarantine", max_bad_share=share)
        assert finals(tmp_path) == []
    assert [record["line"] for record in quarantined(tmp_path)] == [3]


def test_what_is_mended_leaves_no_quarantine(tmp_path):
    source = source_of(tmp_path)
    source.write_bytes(GOOD + b"\noops\n")
    tokenize(tmp_path, on_bad_sample="quarantine", max_bad_share=1)
    assert quarantined(tmp_path)
    source.write_bytes(GOOD + b"\n")
    tokenize(tmp_path, on_bad_sample="quarantine", max_bad_share=1)
    assert not quarantined(tmp_path)


def test_a_bad_line_is_never_held_out(tmp_path):
    source_of(tmp_path).write_bytes(b"".join(b"%s\noops %d\n" % (GOOD, i) for i in range(50)))
    totals = tokenize(tmp_path, on_bad_sample="quarantine", max_bad_share=0.5, heldout_share=0.5)["totals"]
    assert totals["quarantined"] == 50
    assert totals["samples"] + totals["heldout"] == 50


# Files that change, vanish, or cannot be read.


def test_a_file_that_is_removed_while_it_is_read(tmp_path):
    (tmp_path / "f").write_bytes(GOOD * 1000)
    with (
        pytest.raises(UserError, match="was changed while it was read"),
        LineReader(tmp_path / "f", 100) as reader,
    ):
        for _ in reader:
            (tmp_path / "f").unlink(missing_ok=True)


@pytest.mark.parametrize("change", ["append", "replace", "shorten"])
def test_a_file_that_changes_while_it_is_read(tmp_path, change):
    path = tmp_path / "f"
    path.write_bytes((GOOD + b"\n") * 1000)
    with pytest.raises(UserError, match="was changed while it was read"), LineReader(path, 100) as reader:
        for number, _ in enumerate(reader):
            if number:
                continue
            if change == "append":
                with open(path, "ab") as file:
                    file.write(GOOD)
            elif change == "replace":
                write_bytes(path, (GOOD + b"\n") * 1000)
            else:
                os.truncate(path, 10_000)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        LineReader(tmp_path / "f")


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="no /proc: no file whose reading fails for root"
)
def test_a_file_that_cannot_be_read():
    # It opens, and fails at the first read.
    with (
        pytest.raises(UserError, match="/proc/self/mem cannot be read"),
        LineReader("/proc/self/mem") as reader,
    ):
        list(reader)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path):
    source_of(tmp_path).write_bytes(GOOD)
    source_of(tmp_path).chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        tokenize(tmp_path)


def test_links(tmp_path):
    real = source_of(tmp_path, "real.jsonl")
    real.write_bytes(GOOD)
    folder = real.parent
    (folder / "up").symlink_to(tmp_path / "in", target_is_directory=True)
    (folder / "self").symlink_to(folder / "self")
    (folder / "also.jsonl").symlink_to(real)
    assert tokenize(tmp_path)["totals"]["samples"] == 2
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    with pytest.raises(UserError, match=r"loop\.jsonl cannot be read"):
        tokenize(tmp_path)


def test_two_files_of_one_name(tmp_path):
    source_of(tmp_path, "f.jsonl").write_bytes(GOOD)
    other = tmp_path / "in" / "d" / "processed" / "other" / "f.jsonl"
    other.parent.mkdir()
    other.write_bytes(GOOD)
    with pytest.raises(UserError, match="two files have the same name") as caught:
        tokenize(tmp_path)
    assert str(other) in str(caught.value) and str(source_of(tmp_path)) in str(caught.value)


ODD = "a b; 'c' \"d\" $(e) ü 数据 #%&*[x]{y}\n.v2"


def test_odd_names(tmp_path, run_script):
    source = tmp_path / "in" / ODD / "processed" / ODD / f"{ODD}.jsonl"
    source.parent.mkdir(parents=True)
    source.write_bytes(GOOD + b"\noops\n")
    run_script(
        *("tokenize_dataset.py", "--processed-dir", tmp_path / "in", "--tokenized-dir", tmp_path / "out"),
        *("--tokenizer-path", extended_folder(), "--dataset", ODD),
        *("--on-bad-sample", "quarantine", "--max-bad-share", "0.5"),
    )
    manifest = json.loads((tmp_path / "out" / "manifests" / f"{ODD}.json").read_text())
    assert manifest["totals"]["samples"] == manifest["totals"]["quarantined"] == 1
    assert (tmp_path / "out" / manifest["files"][0]["bin"]).name == f"{ODD}.bin"
    assert (tmp_path / "out" / "manifests" / ODD / f"{ODD}.quarantine.jsonl").exists()


# No space left.

needs_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@needs_full_disk
def test_no_space_left_for_a_file(tmp_path):
    # The temporary file leads to a device that is always full.
    (tmp_path / f".x.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"x\.json could not be written") as caught:
        write_bytes(tmp_path / "x.json", b"x" * 100)
    assert "No space left" in str(caught.value) and "MB free" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@needs_full_disk
def test_no_space_left_for_a_folder(tmp_path):
    with pytest.raises(UserError, match="x could not be written"), atomic_dir(tmp_path / "x") as folder:
        (folder / "f").symlink_to("/dev/full")
        (folder / "f").write_bytes(b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


@needs_full_disk
def test_no_space_left_for_the_tokens(tmp_path):
    source_of(tmp_path).write_bytes((GOOD + b"\n") * 5000)
    train = tmp_path / "out" / "chatml_llamav13_32k" / "train" / "cn" / "d"
    train.mkdir(parents=True)
    (train / f".f.bin.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        tokenize(tmp_path)
    assert finals(tmp_path) == []
    assert tokenize(tmp_path)["totals"]["samples"] == 5000


@needs_full_disk
def test_a_script_on_a_full_disk_ends_with_one_line(repo_root):
    code = "from common.cli import run\nrun(lambda: open('/dev/full', 'w').write('x' * 100_000))"
    environment = os.environ | {"PYTHONPATH": str(repo_root / "workflow_scripts")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No space left on device") and "Traceback" not in done.stderr


# Fuzzing: whatever bytes a file holds, each of its lines comes out once.

fragments = st.one_of(
    st.sampled_from(
        [
            GOOD,
            b"\n",
            b"\r\n",
            b"\r",
            b"\n\n",
            b"\xef\xbb\xbf",
            b"\0",
            b"[]",
            b"[",
            b"]",
            b'"',
            b"\\",
            b" ",
            b"{}",
        ]
    ),
    st.sampled_from(
        [GOOD + b"\n", GOOD[:20], GOOD[20:], b"\xff\xfe", b"\\ud800", b"\xed\xa0\x80", b"null", b"NaN"]
    ),
    st.binary(max_size=12),
    st.text(max_size=8).map(lambda text: json.dumps([{"role": "user", "content": text}]).encode() + b"\n"),
)


@settings(max_examples=300, deadline=None)
@given(data=st.lists(fragments, max_size=12).map(b"".join), block_bytes=st.integers(1, 200))
def test_any_bytes(tmp_path_factory, data, block_bytes):
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(data)
    with LineReader(path, block_bytes) as reader:
        blocks = list(reader)
    lines = [line for block in blocks for line in block.lines]
    # Python's own reading of text files is the reference, for bytes as for characters.
    text = io.TextIOWrapper(io.BytesIO(data.removeprefix(b"\xef\xbb\xbf")), encoding="latin-1").read()
    assert b"\n".join([*lines, b""]) == text.encode("latin-1") + b"\n" * bool(
        text and not text.endswith("\n")
    )
    assert sum(block.size for block in blocks) == reader.size == len(data)
    assert [block.first_line for block in blocks] == [
        1 + sum(len(block.lines) for block in blocks[:i]) for i in range(len(blocks))
    ]
    tokenizer = BlockTokenizer(small_tokenizer("byte_level"), QUARANTINE)
    results = [tokenizer("f", block) for block in blocks]
    bad = [each for result in results for each in result.quarantined]
    assert all(raw == lines[number - 1] and reason for number, raw, reason in bad)
    for number, raw, reason in bad:
        assert raw_line(json.loads(quarantine_record("f", number, raw, reason))) == raw
    # The others give what they give alone, and stop at nothing.
    numbers = {number for number, *_ in bad}
    assert len(numbers) == len(bad)
    good = [line for number, line in enumerate(lines, 1) if number not in numbers]
    path.write_bytes(b"\n".join(good))
    strict = BlockTokenizer(small_tokenizer("byte_level"), TokenizeOptions())
    with LineReader(path) as reader:
        alone = b"".join(strict("f", block).data for block in reader)
    assert b"".join(result.data for result in results) == alone
    assert alone.count(b"\n") == len(good)


def test_damage_at_random_places(tmp_path):
    rng = random.Random(1)
    whole = b"".join(
        json.dumps(
            [{"role": "user", "content": f"question {i} ü"}, {"role": "assistant", "content": "x" * i}]
        ).encode()
        + b"\n"
        for i in range(200)
    )
    for number in range(12):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        folder = tmp_path / str(number)
        source_of(folder).write_bytes(data)
        totals = tokenize(folder, on_bad_sample="quarantine", max_bad_share=1, heldout_share=0.1)["totals"]
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        count = len(lines) - (not lines[-1])
        assert totals["samples"] + totals["heldout"] + totals["quarantined"] == count
        assert totals["quarantined"] == len(quarantined(folder))
