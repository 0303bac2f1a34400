"""Parses the lines of a JSONL file, and explains what is wrong with a bad line and how to fix it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson

from snaketune.chat_format.chat_template import MessageError, Turn, refuse_half_characters
from snaketune.common.cli import UserError

# Tokens rarely have more bytes. A line with more bytes per kept token would lose almost all of its text, and takes
# about 200 times its size in memory in the tokenizers library.
_BYTES_PER_TOKEN = 64
_ALWAYS_ALLOWED_BYTES = 8 << 20
_INGEST = "convert the file first: python workflow_scripts/ingest_dataset.py --help"


class BadLine(ValueError):
    """A line that cannot be trained on. `str` gives the reason on one line, without file and line number."""

    def __init__(self, what: str, *, found: object, expected: str, fix: str):
        super().__init__(f"{what}; found: {found}; expected: {expected}")
        self.what, self.found, self.expected, self.fix = what, found, expected, fix

    def at(self, where: str) -> UserError:
        """Returns the UserError for this line; `where` is `file:line`."""
        return UserError(f"{where}: {self.what}", found=self.found, expected=self.expected, fix=self.fix)

    @classmethod
    def from_message(cls, error: MessageError, value: Any = None) -> BadLine:
        """Makes a BadLine from a MessageError; `value` is the conversation, if known."""
        fix = error.fix
        other = _other_format(value)
        if other:
            fix = f"this looks like {other}; {_INGEST}"
        what = f"invalid {error.field}"
        return cls(what, found=error.found, expected=error.expected, fix=fix)


def read_conversation(
    line: bytes, turns: Callable[[Any], list[Turn]], max_length: int, cut_off: bool = False
) -> list[Turn]:
    """Returns the turns of the conversation on a line.

    Args:
        line: Its bytes, without line break.
        turns: The chat template's function that turns messages into turns.
        max_length: Tokens to keep of a conversation.
        cut_off: True if this is the last line of the file and has no line break.

    Raises:
        BadLine: The line is not a conversation.
    """
    limit = max(_ALWAYS_ALLOWED_BYTES, _BYTES_PER_TOKEN * max_length)
    if len(line) > limit:
        raise BadLine(
            "the line is too long",
            found=f"{len(line):,} bytes, {line[:60]!r}...",
            expected=f"at most {limit:,} bytes for a conversation of {max_length:,} tokens",
            fix=f"split the conversation (only its first {max_length:,} tokens would be kept), or set long lines aside: "
            "--on-bad-sample quarantine (config: tokenize.on_bad_sample)",
        )
    value = parse_line(line, cut_off)
    if value == []:
        raise BadLine(
            "the conversation is empty",
            found="[], a list without messages",
            expected="a list of messages",
            fix="remove the line: it has nothing to train on",
        )
    try:
        conversation = turns(value)
        if b"\\ud" in line or b"\\uD" in line:
            refuse_half_characters(conversation)
    except MessageError as error:
        raise BadLine.from_message(error, value) from None
    return conversation


def parse_line(line: bytes, cut_off: bool = False) -> Any:
    """Returns the JSON value of a line.

    Raises:
        BadLine: The line is blank, not UTF-8 or not JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    # The standard library decides: it accepts some values that orjson rejects (NaN, half a surrogate pair).
    if not line.strip():
        raise BadLine(
            "blank line",
            found="a line without text",
            expected="one JSON list of messages per line",
            fix="remove the line, even at the end of the file",
        )
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        found, fix = f"{error.reason} at byte {error.start} of the line", "save the file as UTF-8"
        if b"\0" in line[:8]:
            fix += " (it looks like UTF-16)" if line.strip(b"\0") else ""
    except (ValueError, RecursionError) as error:
        found = f"{error}" if isinstance(error, ValueError) else "values nested too deeply"
        fix = "correct the line; each conversation needs its own line"
        if not line.strip(b"\0"):
            found, fix = f"{len(line)} NUL bytes", "copy the file again: a crash left a hole in it"
        elif cut_off:
            found += ", and the file ends here without a line break"
            fix = "copy the file again: it seems to be cut off"
        elif line.strip() in (b"[", b"{"):
            fix = f"the file seems to be one JSON value over many lines; {_INGEST}"
    raise BadLine("not JSON", found=f"{found}, in {line[:60]!r}", expected="a JSON list of messages", fix=fix)


def _other_format(value: Any) -> str | None:
    """Returns the name of a common format that the value seems to be in; the fix then suggests ingest."""
    if isinstance(value, dict):
        keys = {
            "messages": "OpenAI's format",
            "conversations": "ShareGPT's format",
            "instruction": "Alpaca's",
        }
        return next((name for key, name in keys.items() if key in value), None)
    if not isinstance(value, list):
        return None
    for message in value:
        if isinstance(message, dict):
            if "from" in message and "value" in message:
                return "ShareGPT's format"
            if isinstance(message.get("content"), list):
                return "OpenAI's format, with content in several parts"
            if "tool_calls" in message or "tool_call_id" in message or "function_call" in message:
                return "OpenAI's format"
    return None
