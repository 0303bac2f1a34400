"""Ingest: each format, and each kind of bad row."""

from __future__ import annotations

import json
import re

import pytest
from ftdp_files import raw_line
from ftdp_small_tokenizers import small_tokenizer
from ingest_rows import GOOD, HI, answer, as_lines, call, convert, human, openai_call, says, written

from snaketune.chat_files.processed_layout import find_datasets
from snaketune.chat_format.template_file import load_template
from snaketune.common.cli import UserError
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.sample_view import Sample
from snaketune.tokenized.tokenizing import tokenize_datasets


@pytest.mark.parametrize("case", GOOD)
def test_a_row(tmp_path, case):
    row, expected = GOOD[case]
    manifest = convert(tmp_path, as_lines([row]))
    assert written(tmp_path) == [expected]
    assert manifest["files"][0]["formats"] == {case.split(",")[0]: 1}
    assert list(find_datasets(tmp_path / "out")) == ["d"]


def test_real_conversations_come_back_as_they_were(tmp_path, shared_data):
    template = load_template("internlm2_chat")
    originals, rows = [], []
    for file in sorted(shared_data.glob("ftdp/*/processed/*/*.jsonl")):
        originals += [json.loads(line) for line in file.read_bytes().splitlines()]
    for number, conversation in enumerate(originals):
        roles = [message["role"] for message in conversation]
        # One conversation has a result without a call, which OpenAI's format does not allow.
        paired = all(roles[i - 1] == "tool" for i, role in enumerate(roles) if role == "environment")
        rows.append(to_openai(conversation) if number % 2 and paired else to_sharegpt(conversation))
    convert(tmp_path, as_lines(rows), arguments_key="arguments")
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


def test_arguments_may_keep_their_name(tmp_path):
    convert(tmp_path, as_lines([GOOD["sharegpt, calls"][0]]), arguments_key="arguments")
    assert written(tmp_path)[0][2]["content"] == '{"name": "f", "arguments": {"x": 1}}'


def test_what_the_model_sees(tmp_path):
    """The text matches InternLM2's description of its format, chat/chat_format.md in its repository."""
    row = {
        "messages": [
            says("system", "Be kind."),
            says("user", "Weather in Oslo and Rome?"),
            says(
                "assistant",
                None,
                tool_calls=[
                    openai_call("1", "get_weather", '{"city": "Oslo"}'),
                    openai_call("2", "get_weather", '{"city": "Rome"}'),
                ],
            ),
            answer("2", "21"),
            answer("1", "-3"),
            says("assistant", "-3 and 21."),
        ],
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}],
    }
    convert(tmp_path, as_lines([row]))
    tokenizer = small_tokenizer("byte_level")
    tokenize_datasets(tmp_path / "out", tmp_path / "tokenized", tokenizer, TokenizeOptions(mask="exact"))
    (path,) = (tmp_path / "tokenized").rglob("in.bin")
    sample = Sample(path, 0, tokenizer)
    trained = [(text, trained) for trained, _, text in sample.pieces()]
    assert "".join(text for text, _ in trained) == (
        "<s><|im_start|>system\nBe kind.<|im_end|>\n"
        '<|im_start|>system name=<|plugin|>\n[{"name": "get_weather", "parameters": {}}]<|im_end|>\n'
        "<|im_start|>user\nWeather in Oslo and Rome?<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "Oslo"}}<|action_end|>\n'
        '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "Rome"}}<|action_end|>\n'
        "<|im_end|>\n"
        "<|im_start|>environment name=<|plugin|>\n-3<|im_end|>\n"
        "<|im_start|>environment name=<|plugin|>\n21<|im_end|>\n"
        "<|im_start|>assistant\n-3 and 21.<|im_end|>\n"
    )
    learnt = "".join(text for text, trained in trained if trained)
    assert learnt.count("<|action_start|><|plugin|>") == 2 and learnt.endswith("-3 and 21.<|im_end|>\n")
    assert "Be kind" not in learnt and "21<|im_end|>\n<|im_start|>" not in learnt


@pytest.mark.parametrize("page", ["docs/input.md", "docs/zh_cn/input.md"])
def test_the_examples_of_the_docs(tmp_path, repo_root, page):
    text = (repo_root / page).read_text(encoding="utf-8")
    examples = re.findall(r"```json\n(.*)\n```\n\n(?:becomes|变为)\n\n```json\n(.*)\n```", text)
    assert len(examples) == 3
    for row, expected in examples:
        convert(tmp_path, row.encode())
        output = tmp_path / "out" / "d" / "processed" / "sft_chat" / "in.jsonl"
        assert output.read_text(encoding="utf-8") == expected + "\n"


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
        ["messages[1]", "1 results for 2 calls"],
    ),
    "result of no call": ({"messages": [HI[0], answer("1", "r")]}, ["messages[1]", "1 results for 0 calls"]),
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
    # Above the share, only the quarantine is written, and the previous dataset stays.
    with pytest.raises(UserError, match=r"1 of 3 \(33.3%\)"):
        convert(tmp_path, data, on_bad_sample="quarantine", max_bad_share=0.3)
    assert file.exists() and written(tmp_path) == [GOOD["alpaca"][1]] * 2
