"""ShareGPT's format, `{"conversations": [{"from", "value"}, ...], "system", "tools"}`, with LLaMA-Factory's calls."""

from __future__ import annotations

from snaketune.ingest.fields import (
    ConvertOptions,
    bad,
    call_message,
    conversation_of,
    json_of,
    loss_of,
    object_of,
    result_message,
    text_of,
    tools_message,
    with_tools,
)

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
}
_CALLS = ("function_call", "tool_call", "function-call")
_RESULTS = ("observation", "function_response", "tool_response", "function-response", "tool")


def convert(row: dict, options: ConvertOptions) -> list[dict]:
    """Returns the row's conversation in ftdp.

    Raises:
        MessageError: The row is not in the format.
    """
    key, messages = conversation_of(row)
    result: list[dict] = []
    if row.get("system"):
        result.append({"role": "system", "content": text_of(row["system"], "system")})
    for index, message in enumerate(messages):
        field = f"{key}[{index}]"
        message = object_of(message, field)
        speaker = message.get("from")
        value = message.get("value")
        if speaker in _CALLS:
            result += _calls(value, f"{field}.value", options)
        elif not isinstance(speaker, str) or speaker not in {*_ROLES, *_RESULTS}:
            allowed = "one of " + ", ".join((*_ROLES, *_CALLS, *_RESULTS))
            raise bad(f"{field}.from", speaker, allowed, "use one of these")
        elif speaker in _RESULTS:
            result.append(result_message(text_of(value, f"{field}.value")))
        else:
            loss = loss_of(message, field) if _ROLES[speaker] == "assistant" else {}
            content = text_of(value, f"{field}.value")
            result.append({"role": _ROLES[speaker], "content": content, **loss})
    return with_tools(result, tools_message(row.get("tools"), "tools"))


def _calls(value: object, field: str, options: ConvertOptions) -> list[dict]:
    """Returns the calls in a value: one `{"name", "arguments"}` or a list of them, parsed or as a JSON string."""
    value = json_of(value, field) if isinstance(value, str) else value
    several = isinstance(value, list)
    calls = []
    for index, call in enumerate(value if several else [value]):
        place = f"{field}[{index}]" if several else field
        call = object_of(call, place)
        arguments = call.get("arguments", call.get("parameters"))
        calls.append(call_message(call.get("name"), arguments, place, options))
    if not calls:
        raise bad(field, value, "at least one call", "remove the message")
    return calls
