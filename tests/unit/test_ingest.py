"""Ingest: each format, each kind of file, each kind of bad row."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import UserError
from ftdp.layout import find_datasets
from ftdp.quarantine import raw_line
from ftdp.template_file import load_template
from ingest.ingesting import IngestOptions, ingest

TOOLS = [{"name": "f", "description": "does", "parameters": {"type": "object", "properties": {}}}]
PLUGINS = {"role": "system", "name": "plugin", "content": json.dumps(TOOLS)}


def call(name, arguments):
    return {"role": "tool", "name": "plugin", "content": f'{{"name": "{name}", "arguments": {arguments}}}'}


def result(content):
    return {"role": "environment", "name": "plugin", "content": content}


def says(role, content, **more):
    return {"role": role, "content": content, **more}


def openai_call(identity, name, arguments):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(identity, content):
    return {"role": "tool", "tool_call_id": identity, "content": content}


def human(text):
    return {"from": "human", "value": text}


HI = [says("user", "hi"), says("assistant", "hello")]
# name: (row, the conversation in ftdp)
GOOD = {
    "openai": ({"messages": [says("system", "be kind"), *HI]}, [says("system", "be kind"), *HI]),
    "openai, developer": ({"messages": [says("developer", "x"), *HI]}, [says("system", "x"), *HI]),
    "openai, parts": (
        {
            "messages": [
                says("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "\nb"}, "c"]),
                HI[1],
            ]
        },
        [says("user", "a\nbc"), HI[1]],
    ),
    "openai, two calls, results in another order": (
        {
            "messages": [
                says("system", "s"),
                says("user", "q"),
                says(
                    "assistant",
                    None,
                    tool_calls=[openai_call("1", "f", '{"x": 1.10}'), openai_call("2", "g", {"y": "é"})],
                ),
                answer("2", "second"),
                answer("1", [{"type": "text", "text": "first"}]),
                says("assistant", "done"),
            ],
            "tools": [{"type": "function", "function": TOOLS[0]}],
        },
        [
            *(says("system", "s"), PLUGINS, says("user", "q"), says("assistant", "")),
            *(call("f", '{"x": 1.10}'), call("g", '{"y": "é"}'), result("first"), result("second")),
            says("assistant", "done"),
        ],
    ),
    "openai, words before the call": (
        {"messages": [HI[0], says("assistant", "wait", tool_calls=[openai_call("1", "f", "")])]},
        [HI[0], says("assistant", "wait"), call("f", "{}")],
    ),
    "openai, functions of old": (
        {
            "messages": [
                HI[0],
                says("assistant", None, function_call={"name": "f", "arguments": "{}"}),
                {"role": "function", "name": "f", "content": "r"},
                HI[1],
            ],
            "functions": TOOLS,
        },
        [PLUGINS, HI[0], says("assistant", ""), call("f", "{}"), result("r"), HI[1]],
    ),
    "openai, tools as text": ({"messages": HI, "tools": json.dumps(TOOLS)}, [PLUGINS, *HI]),
    "openai, no tools": ({"messages": HI, "tools": [], "functions": None}, HI),
    "openai, weight": (
        {"messages": [HI[0], {**HI[1], "weight": 0}, HI[0], {**HI[1], "weight": 1}]},
        [HI[0], {**HI[1], "loss": False}, *HI],
    ),
    "openai, name": (
        {"messages": [says("user", "hi", name="Anna"), HI[1]]},
        [says("user", "hi", name="Anna"), HI[1]],
    ),
    "openai, refusal": (
        {"messages": [HI[0], says("assistant", None, refusal="I will not.")]},
        [HI[0], says("assistant", "I will not.")],
    ),
    "sharegpt": (
        {"conversations": [human("hi"), {"from": "gpt", "value": "hello"}], "system": "s", "id": 7},
        [says("system", "s"), *HI],
    ),
    "sharegpt, calls": (
        {
            "conversations": [
                human("q"),
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "done"},
            ],
            "tools": json.dumps(TOOLS),
        },
        [PLUGINS, says("user", "q"), call("f", '{"x": 1}'), result("r"), says("assistant", "done")],
    ),
    "sharegpt, two calls": (
        {
            "conversations": [
                human("q"),
                {
                    "from": "function_call",
                    "value": '[{"name": "f", "arguments": {}}, {"name": "g", "parameters": {}}]',
                },
                {"from": "tool_response", "value": "a"},
                {"from": "tool_response", "value": "b"},
            ]
        },
        [says("user", "q"), call("f", "{}"), call("g", "{}"), result("a"), result("b")],
    ),
    "sharegpt, under messages": (
        {"messages": [human("hi"), {"from": "assistant", "value": "hello", "train": False}]},
        [HI[0], {**HI[1], "loss": False}],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1+1", "output": "2"},
        [says("user", "Add.\n1+1"), says("assistant", "2")],
    ),
    "alpaca, history": (
        {"instruction": "b", "input": "", "output": "B", "system": "s", "history": [["a", "A"]]},
        [
            says("system", "s"),
            says("user", "a"),
            says("assistant", "A"),
            says("user", "b"),
            says("assistant", "B"),
        ],
    ),
    "ftdp": ([*HI, call("f", "{}")], [*HI, call("f", "{}")]),
}


def convert(tmp_path, data: bytes, name="in.jsonl", **options):
    (tmp_path / name).write_bytes(data)
    return ingest([tmp_path / name], tmp_path / "out", "d", IngestOptions(**options))


def written(tmp_path, name="in"):
    lines = (tmp_path / "out" / "d" / "processed" / "sft_chat" / f"{name}.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines]


def as_lines(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("case", GOOD)
def test_a_row(tmp_path, case):
    row, expected = GOOD[case]
    manifest = convert(tmp_path, as_lines([row]))
    assert written(tmp_path) == [expected]
    assert manifest["files"][0]["formats"] == {case.split(",")[0]: 1}
    assert list(find_datasets(tmp_path / "out")) == ["d"]


def test_real_conversations_come_back_as_they_were(tmp_path, shared_data):
    template = load_template()
    originals, rows = [], []
    for file in sorted(shared_data.glob("ftdp/*/processed/*/*.jsonl")):
        originals += [json.loads(line) for line in file.read_bytes().splitlines()]
    for number, conversation in enumerate(originals):
        roles = [message["role"] for message in conversation]
        # One of them has a result without a call, which OpenAI's format does not allow.
        paired = all(roles[i - 1] == "tool" for i, role in enumerate(roles) if role == "environment")
        rows.append(to_openai(conversation) if number % 2 and paired else to_sharegpt(conversation))
    convert(tmp_path, as_lines(rows))
    assert len(originals) == 600
    assert list(map(template.render, written(tmp_path))) == list(map(template.render, originals))


def to_openai(conversation):
    row = {"messages": []}
    for index, message in enumerate(conversation):
        role, content = message["role"], message["content"]
        if role == "system":
            row["tools"] = [{"type": "function", "function": tool} for tool in json.loads(content)]
        elif role == "environment":
            row["messages"].append(answer(f"call-{index - 1}", content))
        elif role == "tool":
            wanted = json.loads(content)
            arguments = json.dumps(wanted["arguments"], ensure_ascii=False)
            each = openai_call(f"call-{index}", wanted["name"], arguments)
            if conversation[index - 1]["role"] != "assistant":
                row["messages"].append(says("assistant", None))
            row["messages"][-1]["tool_calls"] = [each]
        else:
            row["messages"].append(says(role, content))
    return row


def to_sharegpt(conversation):
    speakers = {"user": "human", "assistant": "gpt", "tool": "function_call", "environment": "observation"}
    spoken = [message for message in conversation if message["role"] != "system"]
    tools = [message["content"] for message in conversation if message["role"] == "system"]
    turns = [{"from": speakers[message["role"]], "value": message["content"]} for message in spoken]
    return {"conversations": turns, "tools": "".join(tools)}


def test_arguments_may_be_called_parameters(tmp_path):
    convert(tmp_path, as_lines([GOOD["sharegpt, calls"][0]]), arguments_key="parameters")
    assert written(tmp_path)[0][2]["content"] == '{"name": "f", "parameters": {"x": 1}}'


ROWS = [row for row, _ in GOOD.values() if isinstance(row, dict)]
EXPECTED = [expected for row, expected in GOOD.values() if isinstance(row, dict)]


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
    # The first bytes decide, not the name.
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

    # Arrow gives every message every key, with null where it has none.
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
    with pytest.raises(UserError, match=r"q\.parquet is not a whole Parquet file"):
        ingest([tmp_path / "q.parquet"], tmp_path / "out", "d", IngestOptions())


BAD = {
    "not JSON": (b"{oops", ["not JSON"]),
    "blank": (b"", ["blank line"]),
    "not UTF-8": (b'{"instruction": "\xff", "output": ""}', ["UTF-8"]),
    "a number": (b"3", ["row", "messages (OpenAI)"]),
    "unknown keys": (b'{"text": "hi"}', ["'text'", "messages (OpenAI)"]),
    "no messages": ({"messages": []}, ["at least one message"]),
    "messages is text": ({"messages": "hi"}, ["messages", "JSON"]),
    "messages is an object": ({"messages": {"role": "user"}}, ["messages", "a list"]),
    "message is text": ({"messages": ["hi"]}, ["messages[0]", "an object"]),
    "unknown role": ({"messages": [says("bot", "hi")]}, ["messages[0].role", "'bot'"]),
    "no role": ({"messages": [{"content": "hi"}]}, ["messages[0].role", "None"]),
    "no content": ({"messages": [{"role": "user"}]}, ["messages[0].content", "a string"]),
    "no content of the assistant": ({"messages": [{"role": "assistant"}]}, ["messages[0].content"]),
    "image": (
        {"messages": [says("user", [{"type": "image_url", "image_url": {}}])]},
        ["messages[0].content[0].type", "'image_url'"],
    ),
    "arguments not JSON": (
        {"messages": [says("assistant", None, tool_calls=[openai_call("1", "f", "{x")])]},
        ["messages[0].tool_calls[0].function.arguments", "JSON"],
    ),
    "arguments no object": (
        {"messages": [says("assistant", None, tool_calls=[openai_call("1", "f", "[1]")])]},
        ["arguments", "an object"],
    ),
    "a call without a name": (
        {"messages": [says("assistant", None, tool_calls=[openai_call("1", None, "{}")])]},
        ["tool_calls[0].function.name", "a string"],
    ),
    "one result of two calls": (
        {
            "messages": [
                says("assistant", "", tool_calls=[openai_call(i, "f", "{}") for i in "12"]),
                answer("1", "r"),
            ]
        },
        ["messages[1]", "1 results of 2 calls"],
    ),
    "result of no call": ({"messages": [HI[0], answer("1", "r")]}, ["messages[1]", "1 results of 0 calls"]),
    "result of another call": (
        {"messages": [says("assistant", "", tool_calls=[openai_call("1", "f", "{}")]), answer("2", "r")]},
        ["messages[1].tool_call_id", "'2'", "each of 1"],
    ),
    "two results of one call": (
        {
            "messages": [
                says("assistant", "", tool_calls=[openai_call(i, "f", "{}") for i in "12"]),
                *(answer("1", "r"), answer("1", "s")),
            ]
        },
        ["tool_call_id"],
    ),
    "thoughts": (
        {"messages": [says("assistant", "x", reasoning_content="hm")]},
        ["messages[0].reasoning_content", "move it into content"],
    ),
    "half a weight": ({"messages": [says("assistant", "x", weight=0.5)]}, ["messages[0].weight", "0.5"]),
    "a tool without a name": ({"messages": HI, "tools": [{"type": "retrieval"}]}, ["tools[0]", "a name"]),
    "unknown speaker": (
        {"conversations": [{"from": "alien", "value": "x"}]},
        ["conversations[0].from", "'alien'"],
    ),
    "value is null": ({"conversations": [{"from": "gpt", "value": None}]}, ["conversations[0].value"]),
    "call is not JSON": (
        {"conversations": [human("q"), {"from": "function_call", "value": "f(x)"}]},
        ["conversations[1].value", "JSON"],
    ),
    "no call": (
        {"conversations": [human("q"), {"from": "function_call", "value": "[]"}]},
        ["at least one call"],
    ),
    "no output": ({"instruction": "x"}, ["output", "a string"]),
    "history of one": ({"instruction": "x", "output": "y", "history": [["a"]]}, ["history[0]"]),
    "ftdp, tool first": ([call("f", "{}")], ["[0].role", "message first"]),
    "half a character": (b'{"instruction": "\\ud83d", "output": ""}', ["surrogate"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row(tmp_path, case):
    row, expected = BAD[case]
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    good = as_lines([GOOD["alpaca"][0]])
    data = good + line + b"\n" + good
    with pytest.raises(UserError) as caught:
        convert(tmp_path, data)
    text = str(caught.value)
    assert f"{tmp_path / 'in.jsonl'}:2: " in text
    for part in (*expected, "found:", "expected:", "to fix:"):
        assert part in text, text
    assert "ingest_dataset.py" not in text or case in ("not JSON",)
    assert not (tmp_path / "out" / "d" / "processed").exists()
    totals = convert(tmp_path, data, on_bad_sample="quarantine", max_bad_share=0.4)["totals"]
    assert totals == {"rows": 3, "samples": 2, "quarantined": 1}
    assert written(tmp_path) == [GOOD["alpaca"][1]] * 2
    file = tmp_path / "out" / "d" / "quarantine" / "in.quarantine.jsonl"
    record = json.loads(file.read_bytes())
    assert (record["file"], record["line"], raw_line(record)) == ("in.jsonl", 2, line)
    assert all(part in record["reason"] or part in text for part in expected)
    # Above the share nothing but the quarantine stays, and the dataset of before.
    with pytest.raises(UserError, match=r"1 of 3 \(33.3%\)"):
        convert(tmp_path, data, on_bad_sample="quarantine", max_bad_share=0.3)
    assert file.exists() and written(tmp_path) == [GOOD["alpaca"][1]] * 2


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

    from ingest import rows as module

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
    assert "holds nothing to read" in refused([folder])
    assert "does not exist" in refused([tmp_path / "nothing.json"])
    (tmp_path / "a.txt").write_text("x")
    assert "no known kind" in refused([tmp_path / "a.txt"])
    (folder / "a b.jsonl").write_bytes(as_lines([GOOD["alpaca"][0]]))
    (folder / "deep" / "ü;'.json").write_bytes(as_lines([GOOD["sharegpt"][0]]))
    (folder / "notes.txt").write_text("not read")
    manifest = ingest([folder], tmp_path / "out", "d", IngestOptions())
    assert [file["output"] for file in manifest["files"]] == ["sft_chat/a b.jsonl", "sft_chat/ü;'.jsonl"]
    assert len(find_datasets(tmp_path / "out")["d"]) == 2
    (folder / "deep" / "a b.json.gz").write_bytes(b"")
    assert "would both become a b.jsonl" in refused([folder])
    for name in ("", ".hidden", "a/b", ".."):
        assert "cannot name a folder" in refused([folder], dataset=name)
    mine = tmp_path / "out" / "mine" / "processed"
    mine.mkdir(parents=True)
    assert "ingest did not write" in refused([tmp_path / "a.txt"], dataset="mine")
    assert "lies in the folder that is written" in refused([tmp_path / "out" / "d" / "processed"])


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


def test_the_command(tmp_path, run_script):
    (tmp_path / "in.jsonl").write_bytes(as_lines(ROWS) + b"oops\n")
    base = (
        "ingest_dataset.py",
        "--input",
        tmp_path / "in.jsonl",
        "--processed-dir",
        tmp_path / "out",
        "--dataset",
        "d",
    )
    done = run_script(*base, check=False)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and "in.jsonl:18: not JSON" in done.stderr
    )
    done = run_script(*base, "--on-bad-sample", "quarantine", "--max-bad-share", "0.1")
    assert f"{len(ROWS)} conversations of {len(ROWS) + 1} rows, 1 bad rows" in done.stdout
    assert "out of range" in run_script(*base, "--max-bad-share", "2", check=False).stderr
