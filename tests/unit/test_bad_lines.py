"""Bad lines of each kind, in a run that stops at them and in a run that sets them aside."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from ftdp_files import GOOD, SET_ASIDE, bin_of, finals, quarantined, raw_line, source_of, tokenize
from ftdp_small_tokenizers import extended_folder, small_tokenizer

from snaketune.chat_files import line_reader as reading
from snaketune.chat_files.line_reader import LineReader
from snaketune.common.cli import UserError
from snaketune.tokenized import chunk_writer
from snaketune.tokenized.bin_writer import write_tokenized
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.tokenizing import _Run, tokenize_datasets


def openai(**fields) -> bytes:
    return json.dumps([{"role": "user", "content": "hi", **fields}]).encode()


# name: (file, numbers of its bad lines, texts that the first bad line's message must contain)
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
        ["[0].content", "content in several parts", "ingest_dataset.py"],
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
    manifest = tokenize(tmp_path, **SET_ASIDE, **more)
    records = quarantined(tmp_path)
    lines = data.split(b"\n")
    assert [record["line"] for record in records] == bad
    assert [raw_line(record) for record in records] == [lines[number - 1] for number in bad]
    assert all(record["file"] and record["reason"] for record in records)
    count = len(lines) - (not lines[-1])
    assert manifest["totals"]["samples"] == count - len(bad) == bin_of(tmp_path).count(b"\n")
    assert manifest["totals"]["quarantined"] == len(bad)


# name: (file, an equivalent file)
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
    with pytest.raises(UserError) as caught:
        tokenize(tmp_path)
    for part in (f"{source}:2: ", "too long", "51,000,0", "8,388,608", "--on-bad-sample quarantine"):
        assert part in str(caught.value)
    assert finals(tmp_path) == []
    totals = tokenize(tmp_path, on_bad_sample="quarantine", max_bad_share=0.4)["totals"]
    assert (totals["samples"], totals["quarantined"]) == (2, 1)
    assert raw_line(quarantined(tmp_path)[0]) == data.split(b"\n")[1]


@pytest.mark.slow
def test_the_memory_of_a_line_of_50_mb(tmp_path, repo_root):
    script = repo_root / "workflow_scripts" / "tokenize_dataset.py"
    program = (
        "import resource, subprocess, sys\n"
        "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode\n"
        "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
    )

    def peak(name, long_line, threads):
        """Returns the peak memory of the larger process in MiB."""
        source_of(tmp_path / name).write_bytes((GOOD + b"\n") * 1000 + long_line + (GOOD + b"\n") * 1000)
        arguments = ["--processed-dir", tmp_path / name / "in", "--tokenized-dir", tmp_path / name / "out"]
        arguments += [
            "--tokenizer-path",
            extended_folder(),
            "--on-bad-sample",
            "quarantine",
            "--threads",
            threads,
        ]
        command = [sys.executable, "-c", program, sys.executable, script, *arguments]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        code, mebibytes = map(int, done.stdout.split())
        assert code == 0
        return mebibytes

    line = GOOD.replace(b"hi", b"hi " * 17_000_000) + b"\n"
    for threads in (1, 2):
        assert (
            peak(f"long{threads}", line, threads) - peak(f"short{threads}", b"", threads)
            < 6 * len(line) >> 20
        )


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1000)
    source_of(tmp_path).write_bytes(GOOD + b"\n" + GOOD.replace(b"hi", b"hi " * 700))
    with (
        pytest.raises(UserError, match=r"f\.jsonl has a line of more than") as caught,
        LineReader(source_of(tmp_path), 100) as reader,
    ):
        list(reader)
    assert f"begins at byte {len(GOOD) + 1}" in str(caught.value)


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
    tokenize(tmp_path, **SET_ASIDE)
    assert quarantined(tmp_path)
    source.write_bytes(GOOD + b"\n")
    tokenize(tmp_path, **SET_ASIDE)
    assert not quarantined(tmp_path)


def test_a_bad_line_is_never_held_out(tmp_path):
    source_of(tmp_path).write_bytes(b"".join(b"%s\noops %d\n" % (GOOD, i) for i in range(50)))
    totals = tokenize(tmp_path, on_bad_sample="quarantine", max_bad_share=0.5, heldout_share=0.5)["totals"]
    assert totals["quarantined"] == 50
    assert totals["samples"] + totals["heldout"] == 50


@pytest.mark.parametrize("lost", ["a block of lines", "a sample"])
def test_what_is_lost_on_the_way_is_noticed(tmp_path, monkeypatch, lost):
    source_of(tmp_path).write_bytes((GOOD + b"\n") * 20_000)
    shown, write = _Run._shown, write_tokenized
    if lost == "a sample":

        def one_less(train, valid, parts, **options):
            return write(
                train, valid, ((t.chosen(t.lengths.cumsum() > 1000), v) for t, v in parts), **options
            )

        monkeypatch.setattr(chunk_writer, "write_tokenized", one_less)
    else:
        monkeypatch.setattr(_Run, "_shown", lambda *arguments: list(shown(*arguments))[1:])
    with pytest.raises(AssertionError, match="not (account for all lines|every byte was tokenised)"):
        tokenize(tmp_path)
    assert not list((tmp_path / "out" / "manifests").glob("*.json"))


@pytest.mark.parametrize("shard_bytes", [10**9, 400])
def test_another_answer_to_bad_lines_keeps_what_is_done(tmp_path, shard_bytes):
    source_of(tmp_path, "a.jsonl").write_bytes((GOOD + b"\n") * 20)
    source_of(tmp_path, "b.jsonl").write_bytes((GOOD + b"\n") * 5)
    source_of(tmp_path, "c.jsonl").write_bytes((GOOD + b"\n") * 19 + b"oops\n")

    def run(**options):
        options = TokenizeOptions(**options)
        return tokenize_datasets(
            tmp_path / "in", tmp_path / "out", small_tokenizer("byte_level"), options, shard_bytes=shard_bytes
        )["d"]

    def done():
        """Returns the mtimes of the files written for the good file."""
        files = [
            path for path in (tmp_path / "out" / "chunks" / "d" / "a").iterdir() if path.suffix == ".json"
        ]
        return {path.name: path.stat().st_mtime_ns for path in files}

    with pytest.raises(UserError, match=r"c\.jsonl:20: not JSON"):
        run()
    before = done()
    assert before
    first = run(on_bad_sample="quarantine", max_bad_share=0.05)
    kept = done()
    assert first["totals"]["quarantined"] == 1
    # A finished file stays finished. For a file in ranges, the finished ranges are joined now.
    assert kept == before or shard_bytes == 400
    with pytest.raises(UserError, match=r"c\.jsonl:20: not JSON"):
        run()
    assert done() == kept
    with pytest.raises(UserError, match="1 of 20"):
        run(on_bad_sample="quarantine", max_bad_share=0.04)
    assert run(on_bad_sample="quarantine", max_bad_share=0.05) == first
    assert done() == kept
