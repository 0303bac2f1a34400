"""Ingest: each kind of file, complete and broken, and the memory it takes."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from ftdp_files import SET_ASIDE, raw_line
from ftdp_small_tokenizers import extended_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_rows import EXPECTED, GOOD, ROWS, as_lines, convert, written

from snaketune.chat_files.processed_layout import find_datasets
from snaketune.common.cli import UserError
from snaketune.ingest import ingesting
from snaketune.ingest.ingesting import IngestOptions, ingest


def test_a_single_list_and_values_in_a_row(tmp_path):
    for number, data in enumerate(
        (
            json.dumps(ROWS, indent=2),
            "\ufeff" + json.dumps(ROWS, ensure_ascii=False),
            "\n\n".join(json.dumps(row, indent=1) for row in ROWS),
            "".join(map(json.dumps, ROWS)),
        )
    ):
        assert convert(tmp_path, data.encode(), f"v{number}.json")["totals"]["samples"] == len(ROWS)
        assert written(tmp_path, f"v{number}") == EXPECTED
    assert convert(tmp_path, b"", "empty.json")["totals"]["rows"] == 0
    assert convert(tmp_path, b" [ ] \n", "none.json")["totals"]["rows"] == 0


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_compressed(tmp_path, suffix):
    pyarrow = pytest.importorskip("pyarrow")
    data = as_lines(ROWS) if suffix == "jsonl" else json.dumps(ROWS).encode()
    convert(tmp_path, gzip.compress(data[:100]) + gzip.compress(data[100:]), f"g.{suffix}.gz")
    assert written(tmp_path, "g") == EXPECTED
    # The first bytes decide, not the file name.
    convert(tmp_path, gzip.compress(data), f"n.{suffix}")
    assert written(tmp_path, "n") == EXPECTED
    for name in ("1", "2"):
        with pyarrow.CompressedOutputStream(tmp_path / name, "zstd") as stream:
            stream.write(data[:100] if name == "1" else data[100:])
    frames = (tmp_path / "1").read_bytes() + (tmp_path / "2").read_bytes()
    convert(tmp_path, frames, f"z.{suffix}.zst")
    assert written(tmp_path, "z") == EXPECTED


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "json.gz", "json.zst"])
def test_compressed_data_that_was_cut_off(tmp_path, suffix):
    pyarrow = pytest.importorskip("pyarrow")
    data = as_lines([{"instruction": str(i), "output": "x"} for i in range(2000)])
    with pyarrow.CompressedOutputStream(tmp_path / "whole", "gzip" if "gz" in suffix else "zstd") as stream:
        stream.write(data)
    whole = (tmp_path / "whole").read_bytes()
    parts = [whole[: len(whole) // 2], whole[:-2]]
    if "gz" in suffix:  # its checksum is not optional
        parts.append(whole[:50] + b"\xff\xff\xff" + whole[53:])
    for part in parts:
        with pytest.raises(UserError, match=f"cut.{suffix} cannot be read"):
            convert(tmp_path, part, f"cut.{suffix}", on_bad_sample="quarantine", max_bad_share=1)
    assert not (tmp_path / "out" / "d" / "processed").exists()


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    # Arrow gives every message every key, with null for missing values.
    names = ["openai", "openai, two calls, results in another order", "openai, weight", "openai, no tools"]
    rows = [json.loads(json.dumps(GOOD[name][0])) for name in names]
    for row in rows:
        row["tools"] = json.dumps(row["tools"]) if row.get("tools") else None
        for message in row["messages"]:
            if isinstance(message["content"], list):
                message["content"] = "".join(part["text"] for part in message["content"])
            for each in message.get("tool_calls") or ():
                if not isinstance(each["function"]["arguments"], str):
                    each["function"]["arguments"] = json.dumps(
                        each["function"]["arguments"], ensure_ascii=False
                    )
    parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=2, compression="zstd"
    )
    manifest = ingest([tmp_path / "p.parquet"], tmp_path / "out", "d", IngestOptions())
    assert written(tmp_path, "p") == [GOOD[name][1] for name in names]
    assert manifest["totals"] == {"rows": 4, "samples": 4, "quarantined": 0}
    (tmp_path / "q.parquet").write_bytes((tmp_path / "p.parquet").read_bytes()[:-10])
    with pytest.raises(UserError, match=r"q\.parquet is not a complete Parquet file"):
        ingest([tmp_path / "q.parquet"], tmp_path / "out", "d", IngestOptions())


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'[{"instruction": "a", "output": "b"}', "the list has no end"),
        (b'[{"instruction": "a", "output": "b"},', "the list has no end"),
        (b'[{"instruction": "a", "output": "b"} {"x": 1}]', "no comma"),
        (b'[{"instruction": "a", "output": "b"}] x', "text after the end"),
        (b'[{"instruction": "a", "output": "b"}, {"x": tru}]', "Expecting value"),
        (b'[{"instruction": "a", "outp', "Unterminated string"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_json(tmp_path, data, found):
    with pytest.raises(UserError, match=r"b\.json: not JSON at character \d") as caught:
        convert(tmp_path, data, "b.json", on_bad_sample="quarantine", max_bad_share=1)
    assert found in str(caught.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(values, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    listed=st.booleans(),
)
def test_json_in_pieces_is_json_at_once(rows, chunk, indent, ascii_only, listed):
    import io
    from pathlib import Path

    from snaketune.ingest import rows as module

    if not listed:
        rows = [row for row in rows if isinstance(row, dict)]
    texts = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    text = f"[{', '.join(texts)}]" if listed else "\n".join(texts)
    if listed and rows:
        assert json.loads(text) == rows
    before, module._CHUNK = module._CHUNK, chunk
    try:
        data = text.encode("utf-8", "surrogatepass")
        found = [value for _, value in module._JsonValues(io.BytesIO(data), Path("x.json"))]
    finally:
        module._CHUNK = before
    assert found == rows


def test_inputs(tmp_path):
    def refused(inputs, **fields):
        with pytest.raises(UserError) as caught:
            ingest(inputs, tmp_path / "out", fields.get("dataset", "d"), IngestOptions())
        return str(caught.value)

    folder = tmp_path / "my data; 'quoted' ü"
    (folder / "deep").mkdir(parents=True)
    assert "has no files to read" in refused([folder])
    assert "does not exist" in refused([tmp_path / "nothing.json"])
    (tmp_path / "a.txt").write_text("x")
    assert "is not a known kind of file" in refused([tmp_path / "a.txt"])
    (folder / "a b.jsonl").write_bytes(as_lines([GOOD["alpaca"][0]]))
    (folder / "deep" / "ü;'.json").write_bytes(as_lines([GOOD["sharegpt"][0]]))
    (folder / "notes.txt").write_text("not read")
    manifest = ingest([folder], tmp_path / "out", "d", IngestOptions())
    assert [file["output"] for file in manifest["files"]] == ["sft_chat/a b.jsonl", "sft_chat/ü;'.jsonl"]
    assert len(find_datasets(tmp_path / "out")["d"]) == 2
    (folder / "deep" / "a b.json.gz").write_bytes(b"")
    assert "would both become a b.jsonl" in refused([folder])
    for name in ("", ".hidden", "a/b", ".."):
        assert "not valid as a folder name" in refused([folder], dataset=name)
    mine = tmp_path / "out" / "mine" / "processed"
    mine.mkdir(parents=True)
    assert "ingest did not write" in refused([tmp_path / "a.txt"], dataset="mine")
    assert "is in the folder to be written" in refused([tmp_path / "out" / "d" / "processed"])


def test_again_gives_the_same_bytes_and_replaces(tmp_path):
    convert(tmp_path, as_lines([GOOD["alpaca"][0]]), "old.jsonl")
    convert(tmp_path, as_lines(ROWS))
    manifest = (tmp_path / "out" / "d" / "ingest.json").read_bytes()
    convert(tmp_path, as_lines(ROWS))
    assert (tmp_path / "out" / "d" / "ingest.json").read_bytes() == manifest
    assert [path.name for path in (tmp_path / "out" / "d" / "processed" / "sft_chat").iterdir()] == [
        "in.jsonl"
    ]
    assert sorted(path.name for path in (tmp_path / "out" / "d").iterdir()) == ["ingest.json", "processed"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    line = json.dumps({"instruction": "x" * 2000, "output": "y"}).encode()
    peaks = []
    for count in (1500, 12_000):
        data = b"[" + b",\n".join([line] * count) + b"]" if suffix == "json" else b"\n".join([line] * count)
        if suffix.endswith("gz"):
            data = gzip.compress(data, 1)
        (tmp_path / f"m.{suffix}").write_bytes(data)
        del data
        tracemalloc.start()
        ingest([tmp_path / f"m.{suffix}"], tmp_path / "out", "d", IngestOptions())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_the_memory_of_parquet_does_not_grow_with_the_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    text = random.Random(1).randbytes(1000).hex()
    peaks = []
    for groups in (4, 40):
        rows = pyarrow.Table.from_pylist([{"instruction": f"{i} {text}", "output": "y"} for i in range(1000)])
        with parquet.ParquetWriter(tmp_path / "m.parquet", rows.schema, use_dictionary=False) as writer:
            for _ in range(groups):
                writer.write_table(rows)
        del rows
        program = (
            "import resource, sys\n"
            "from snaketune.ingest.ingesting import IngestOptions, ingest\n"
            "ingest([sys.argv[1]], sys.argv[2], 'd', IngestOptions())\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", program, tmp_path / "m.parquet", tmp_path / "out"]
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(Path(ingesting.__file__).parents[2])},
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0]


MAGIC = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # of gzip and Zstandard


@settings(max_examples=100, deadline=None)
@given(
    data=st.lists(
        st.sampled_from(
            [
                *(json.dumps(row).encode() for row in ROWS[:2]),
                *b'[]{},:"\\ \n\r',
                b"\xff",
                b"\xef\xbb\xbf",
                b"\0",
            ]
        ).map(lambda part: part if isinstance(part, bytes) else bytes([part]))
        | st.binary(max_size=6),
        max_size=10,
    ).map(b"".join),
    name=st.sampled_from(["x.jsonl", "x.json", "x.jsonl.gz", "x.parquet"]),
    compressed=st.booleans(),
)
def test_any_bytes(tmp_path_factory, data, name, compressed):
    folder = tmp_path_factory.getbasetemp() / "fuzz_ingest"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(data) if compressed else data)
    try:
        totals = ingest([folder / name], folder / "out", "d", IngestOptions("auto", **SET_ASIDE))["totals"]
    except UserError as error:
        # In a JSONL file, a broken row does not affect the others. In other files, the rest is unknown.
        assert name in str(error) and ("jsonl" not in name or (data.startswith(MAGIC) and not compressed))
        return
    lines = len(written(folder, "x"))
    quarantine = folder / "out" / "d" / "quarantine" / "x.quarantine.jsonl"
    bad = [json.loads(line) for line in quarantine.read_bytes().splitlines()] if quarantine.exists() else []
    assert totals == {"rows": lines + len(bad), "samples": lines, "quarantined": len(bad)}
    if "jsonl" in name:
        plain = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        assert totals["rows"] == len(plain) - (not plain[-1])
        assert [raw_line(record) for record in bad] == [plain[record["line"] - 1] for record in bad]


def test_the_command(tmp_path, run_script):
    (tmp_path / "in.jsonl").write_bytes(as_lines(ROWS) + b"oops\n")
    base = ("ingest_dataset.py", "--input", tmp_path / "in.jsonl")
    base += ("--processed-dir", tmp_path / "out", "--dataset", "d")
    done = run_script(*base, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert f"in.jsonl:{len(ROWS) + 1}: not JSON" in done.stderr
    done = run_script(*base, "--on-bad-sample", "quarantine", "--max-bad-share", "0.1")
    assert f"{len(ROWS)} conversations of {len(ROWS) + 1} rows, 1 bad rows" in done.stdout
    assert "expected at most 1" in run_script(*base, "--max-bad-share", "2", check=False).stderr
    run_script(
        *(
            "tokenize_dataset.py",
            "--processed-dir",
            tmp_path / "out",
            "--tokenized-dir",
            tmp_path / "tokenized",
        ),
        *("--tokenizer-path", extended_folder()),
    )
    totals = json.loads((tmp_path / "tokenized" / "manifests" / "d.json").read_text())["totals"]
    assert totals["samples"] == totals["lines"] == len(ROWS)
