"""Maps format names to converters, and detects the format of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snaketune.chat_format.chat_template import MessageError
from snaketune.ingest import alpaca, openai_messages, sharegpt
from snaketune.ingest.fields import CONVERSATION_KEYS, ConvertOptions, bad, list_of

_CONVERTERS: dict[str, Callable[[dict, ConvertOptions], list[dict]]] = {
    "openai": openai_messages.convert,
    "sharegpt": sharegpt.convert,
    "alpaca": alpaca.convert,
}
FORMATS = (*_CONVERTERS, "ftdp")


def format_of(row: Any) -> str:
    """Returns the name of the format that a row is in.

    Raises:
        MessageError: The row is in no known format.
    """
    if isinstance(row, list):
        return "ftdp"
    if isinstance(row, dict):
        # Each format also occurs under the other format's key.
        for key in CONVERSATION_KEYS:
            if row.get(key) is not None:
                messages = list_of(row[key], key)
                first = messages[0] if messages else None
                for sign, name in (("from", "sharegpt"), ("role", "openai")):
                    if isinstance(first, dict) and sign in first:
                        return name
                return "openai" if key == "messages" else "sharegpt"
        if "instruction" in row:
            return "alpaca"
    keys = (
        f"an object with the keys {sorted(map(str, row))!r:.80}" if isinstance(row, dict) else f"{row!r:.80}"
    )
    raise MessageError(
        "row",
        found=keys,
        expected="messages (OpenAI), conversations (ShareGPT), instruction (Alpaca), or a list of messages (ftdp)",
        fix="rename the keys to match one of these formats",
    )


def convert(
    row: Any, name: str, options: ConvertOptions, check: Callable[[list[dict]], None]
) -> tuple[str, list[dict]]:
    """Returns the name of the row's format and its conversation in ftdp, with the checks of tokenisation.

    Args:
        row: The row's JSON value.
        name: A format, or "auto".
        options: How to convert it.
        check: Raises a MessageError for a conversation that could not be tokenised.

    Raises:
        MessageError: The row is not in the format.
    """
    chosen = format_of(row) if name == "auto" else name
    if chosen == "ftdp":
        messages = row
    elif isinstance(row, dict):
        messages = _CONVERTERS[chosen](row, options)
    else:
        raise bad("row", row, f"an object in {chosen} format", "correct --format")
    if messages == []:
        raise bad("conversation", messages, "at least one message", "remove the row")
    check(messages)
    return chosen, messages
