"""Rows in each format with their conversations in ftdp, for the tests of ingest."""

from __future__ import annotations

import json

from snaketune.ingest.ingesting import IngestOptions, ingest

TOOLS = [{"name": "f", "description": "does", "parameters": {"type": "object", "properties": {}}}]
PLUGINS = {"role": "system", "name": "plugin", "content": json.dumps(TOOLS)}


def call(name, arguments):
    return {"role": "tool", "name": "plugin", "content": f'{{"name": "{name}", "parameters": {arguments}}}'}


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
    "openai, under conversations": ({"conversations": HI, "id": "x"}, HI),
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
    """Ingests a file with these bytes and returns the manifest."""
    (tmp_path / name).write_bytes(data)
    return ingest([tmp_path / name], tmp_path / "out", "d", IngestOptions(**options))


def written(tmp_path, name="in"):
    """Returns the written conversations."""
    lines = (tmp_path / "out" / "d" / "processed" / "sft_chat" / f"{name}.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines]


def as_lines(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


ROWS = [row for row, _ in GOOD.values() if isinstance(row, dict)]
EXPECTED = [expected for row, expected in GOOD.values() if isinstance(row, dict)]
