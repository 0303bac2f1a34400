"""OpenAI's chat format: `{"messages": [...], "tools": [...]}`, with tool calls and their results.

Source of the format: https://platform.openai.com/docs/api-reference/chat (and its older `functions`).
"""

from __future__ import annotations

from typing import Any

from snaketune.chat_format.chat_template import MessageError
from snaketune.ingest.fields import (
    ConvertOptions,
    bad,
    call_message,
    conversation_of,
    list_of,
    loss_of,
    object_of,
    result_message,
    text_of,
    tools_message,
    with_tools,
)

_ROLES = "one of system, developer, user, assistant, tool, function"
# ftdp has no place for these fields; dropping them silently would lose data.
_NO_PLACE = ("audio", "reasoning_content", "reasoning")


def convert(row: dict, options: ConvertOptions) -> list[dict]:
    """Returns the row's conversation in ftdp.

    Raises:
        MessageError: The row is not in the format, or has a field that ftdp cannot represent.
    """
    result: list[dict] = []
    pending: list[tuple[Any, str]] = []  # (id, field) of the calls whose results come next
    results: list[tuple[Any, str, str]] = []  # (id, content, field)
    key, messages = conversation_of(row)
    for index, message in enumerate(messages):
        field = f"{key}[{index}]"
        message = object_of(message, field)
        role = message.get("role")
        if role in ("tool", "function"):
            content = _content(message, f"{field}.content")
            results.append((message.get("tool_call_id"), content, field))
            continue
        result += _in_order(pending, results)
        pending, results = [], []
        if role in ("system", "developer", "user"):
            content = _content(message, f"{field}.content")
            role = "user" if role == "user" else "system"
            result.append({"role": role, **_name(message, field), "content": content})
        elif role == "assistant":
            calls, pending = _calls(message, field, options)
            result += _assistant(message, field, calls)
        else:
            raise bad(f"{field}.role", role, _ROLES, "use one of these roles")
    result += _in_order(pending, results)
    tools = tools_message(row.get("tools"), "tools") or tools_message(row.get("functions"), "functions")
    return with_tools(result, tools)


def _assistant(message: dict, field: str, calls: list[dict]) -> list[dict]:
    for key in _NO_PLACE:
        if message.get(key):
            raise bad(
                f"{field}.{key}", message[key], "no such field", "move it into content, or remove the field"
            )
    content = message.get("content")
    if content is None and message.get("refusal") is not None:
        content = text_of(message["refusal"], f"{field}.refusal")
    elif content is None and calls:
        content = ""
    else:
        content = _content(message, f"{field}.content")
    loss = loss_of(message, field)
    # The assistant message decides the loss of its turn; the calls that join it carry no loss.
    return [{"role": "assistant", **_name(message, field), "content": content, **loss}, *calls]


def _calls(message: dict, field: str, options: ConvertOptions) -> tuple[list[dict], list[tuple[Any, str]]]:
    """Returns the messages of the calls, and (id, field) of each."""
    calls, ids = [], []
    if message.get("tool_calls") is not None:
        for index, call in enumerate(list_of(message["tool_calls"], f"{field}.tool_calls")):
            place = f"{field}.tool_calls[{index}]"
            function = object_of(object_of(call, place).get("function"), f"{place}.function")
            arguments = function.get("arguments")
            calls.append(call_message(function.get("name"), arguments, f"{place}.function", options))
            ids.append((call.get("id"), place))
    if message.get("function_call") is not None:
        place = f"{field}.function_call"
        function = object_of(message["function_call"], place)
        calls.append(call_message(function.get("name"), function.get("arguments"), place, options))
        ids.append((None, place))
    return calls, ids


def _in_order(calls: list[tuple[Any, str]], results: list[tuple[Any, str, str]]) -> list[dict]:
    """Returns the results in the order of their calls: ftdp has no ids, so calls and results match by order.

    A conversation may end or continue without any results, but some results without the others are an error.
    """
    if not results:
        return []
    if len(results) != len(calls):
        raise MessageError(
            results[-1][2],
            found=f"{len(results)} results for {len(calls)} calls",
            expected="one result for each call in the preceding assistant message",
            fix="add or remove results",
        )
    if all(identity is not None for identity, *_ in results + calls):
        by_id = {identity: content for identity, content, _ in results}
        known = {identity for identity, _ in calls}
        for identity, _, field in results:
            if identity not in known or len(by_id) != len(results):
                expected = "each of " + ", ".join(map(str, known)) + " once"
                raise bad(f"{field}.tool_call_id", identity, expected, "use the id of a call")
        return [result_message(by_id[identity]) for identity, _ in calls]
    return [result_message(content) for _, content, _ in results]


def _name(message: dict, field: str) -> dict[str, str]:
    name = message.get("name")
    return {} if name is None else {"name": text_of(name, f"{field}.name")}


def _content(message: dict, field: str) -> str:
    """Returns the text of a message's content, which is a string or a list of text parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return text_of(content, field)
    texts = []
    for index, part in enumerate(content):
        place = f"{field}[{index}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = object_of(part, place).get("type")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise bad(f"{place}.type", kind, "text", "remove the row; only text can be trained on")
        key = "refusal" if kind == "refusal" else "text"
        texts.append(text_of(part.get(key), f"{place}.{key}"))
    return "".join(texts)
