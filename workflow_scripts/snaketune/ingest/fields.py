"""Shared code of the formats: checks fields, and converts tool descriptions, tool calls and their results to ftdp.

In ftdp, tool descriptions are a system message named `plugin`, a call is a `tool` message named `plugin` that joins the
assistant message before it, and a result is an `environment` message named `plugin`.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from snaketune.chat_format.chat_template import MessageError

PLUGIN = "plugin"
CONVERSATION_KEYS = ("messages", "conversations", "conversation")


class ConvertOptions(NamedTuple):
    """How rows are converted.

    Attributes:
        arguments_key: Key of a call's arguments in ftdp: "parameters", which InternLM2's own models write and lmdeploy
            uses for past calls in prompts, or "arguments" as in OpenAI's format.
    """

    arguments_key: str = "parameters"


def bad(field: str, value: Any, expected: str, fix: str) -> MessageError:
    """Returns the MessageError for a bad field."""
    return MessageError(field, found=f"{value!r:.80} ({type(value).__name__})", expected=expected, fix=fix)


def text_of(value: Any, field: str) -> str:
    """Returns a field that must be a string."""
    if type(value) is not str:
        raise bad(field, value, "a string", 'add a string, "" if there is no text')
    return value


def list_of(value: Any, field: str) -> list:
    """Returns a field that must be a list, or a string with a list as JSON."""
    if isinstance(value, str):
        value = json_of(value, field)
    if not isinstance(value, list):
        raise bad(field, value, "a list", "write it as a list")
    return value


def conversation_of(row: dict) -> tuple[str, list]:
    """Returns the key of a row's messages, and the messages."""
    key = next((key for key in CONVERSATION_KEYS if row.get(key) is not None), CONVERSATION_KEYS[0])
    return key, list_of(row.get(key), key)


def object_of(value: Any, field: str) -> dict:
    """Returns a field that must be an object."""
    if not isinstance(value, dict):
        raise bad(field, value, "an object", "write it as an object")
    return value


def json_of(text: str, field: str) -> Any:
    """Parses a string as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(
            field,
            found=f"{error}, in {text!r:.80}",
            expected="a string that is JSON",
            fix="fix the JSON text",
        ) from None


def tools_message(tools: Any, field: str) -> dict | None:
    """Returns the system message that describes the tools, or None if there are none.

    Args:
        tools: A list of `{"type": "function", "function": {...}}` or of the inner objects, or a string with that list
            as JSON.
        field: The field's name, for errors.
    """
    if tools is None or tools == "":
        return None
    functions = []
    for index, tool in enumerate(list_of(tools, field)):
        tool = object_of(tool, f"{field}[{index}]")
        if isinstance(tool.get("function"), dict):
            tool = tool["function"]
        elif "name" not in tool:
            raise bad(
                f"{field}[{index}]",
                tool,
                "a function with a name",
                "remove the tool; only functions can be described",
            )
        text_of(tool.get("name"), f"{field}[{index}].name")
        functions.append(tool)
    if not functions:
        return None
    return {"role": "system", "name": PLUGIN, "content": json.dumps(functions, ensure_ascii=False)}


def call_message(name: Any, arguments: Any, field: str, options: ConvertOptions) -> dict:
    """Returns the message of one call. Arguments given as JSON text are copied unchanged.

    Args:
        name: The function's name.
        arguments: An object, or a string with an object as JSON; "" and None mean no arguments.
        field: The call's field, for errors.
        options: Gives the key of the arguments.
    """
    name = text_of(name, f"{field}.name")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        object_of(json_of(arguments, f"{field}.arguments"), f"{field}.arguments")
        text = arguments.strip()
    else:
        text = json.dumps(object_of(arguments, f"{field}.arguments"), ensure_ascii=False)
    call = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{options.arguments_key}": {text}}}'
    return {"role": "tool", "name": PLUGIN, "content": call}


def result_message(content: str) -> dict:
    """Returns the message of a call's result."""
    return {"role": "environment", "name": PLUGIN, "content": content}


def with_tools(messages: list[dict], tools: dict | None) -> list[dict]:
    """Inserts the tool descriptions after the leading system messages."""
    if tools is None:
        return messages
    at = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return [*messages[:at], tools, *messages[at:]]


def loss_of(message: dict, field: str) -> dict:
    """Returns {"loss": False} for a message whose `weight` is 0 or whose `train` or `loss` is false, else {}."""
    for key in ("weight", "train", "loss"):
        value = message.get(key)
        if value is not None and (not isinstance(value, int | float) or value not in (0, 1)):
            raise bad(f"{field}.{key}", value, "0 or 1", "use 0 or 1; ftdp has no other weights")
        if value is not None and not value:
            return {"loss": False}
    return {}
