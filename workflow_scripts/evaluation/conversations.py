"""Held-out conversations with where they come from, and the answers in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import UserError
from evaluation.heldout import find_files
from evaluation.languages import language_of
from ftdp.chat_template import ChatTemplate, MessageError, Turn, refuse_half_characters
from ftdp.encode import BatchEncoder


@dataclass(frozen=True)
class Conversation:
    """A conversation of the held-out folder.

    Attributes:
        dataset: Name of its dataset folder.
        file: Its file, relative to the held-out folder.
        line: Number of its line, from 1.
        sha256: Of the line's bytes, without white space around them.
        language: From the dataset's name, or the script of what the user says.
        messages: The messages.
        turns: The same as turns of the chat template.
    """

    dataset: str
    file: str
    line: int
    sha256: str
    language: str
    messages: list[dict[str, Any]]
    turns: list[Turn]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


class AnswerTurn(NamedTuple):
    """The messages that make one turn of the assistant.

    Attributes:
        turn: Index among the conversation's turns.
        start: Index of its first message.
        stop: Index after its last message.
    """

    turn: int
    start: int
    stop: int


def read_conversations(
    folder: Path, encoder: BatchEncoder, max_samples: int | None = None
) -> list[Conversation]:
    """Reads held-out conversations in the order of the files.

    Args:
        folder: Held-out conversations, `<dataset>/processed/<any>/<file>.jsonl`.
        encoder: Makes the turns.
        max_samples: Conversations per dataset; those whose lines have the smallest SHA-256.

    Raises:
        UserError: There are none, or a line is no conversation.
    """
    lines: dict[str, list[tuple[str, int, str, bytes]]] = {}
    for dataset, path in find_files(folder):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.strip()
                if text:
                    entry = (
                        path.relative_to(folder).as_posix(),
                        number,
                        hashlib.sha256(text).hexdigest(),
                        text,
                    )
                    lines.setdefault(dataset, []).append(entry)
    result = []
    for dataset, entries in lines.items():
        if max_samples is not None and len(entries) > max_samples:
            chosen = set(sorted(entries, key=lambda entry: entry[2])[:max_samples])
            entries = [entry for entry in entries if entry in chosen]
        for file, number, sha256, text in entries:
            messages, turns = _parse(folder / file, number, text, encoder)
            language = language_of(dataset, said_by_user(messages))
            result.append(Conversation(dataset, file, number, sha256, language, messages, turns))
    return result


def answer_turns(messages: list[Mapping[str, Any]], template: ChatTemplate) -> list[AnswerTurn]:
    """Returns the turns of the assistant: an assistant message, or a part of its turn, and the parts glued to it.

    Args:
        messages: A conversation in the format.
        template: Its chat template.
    """
    result: list[AnswerTurn] = []
    turn, open_role = -1, None
    for index, message in enumerate(messages):
        role = template.roles[message["role"]]
        role = role.by_name.get(message.get("name"), role)
        owner = role.part_of or message["role"]
        if role.part_of is not None and open_role == owner:
            if owner == "assistant":
                result[-1] = result[-1]._replace(stop=index + 1)
        elif role.opens is None:  # else it is written into the next turn
            turn, open_role = turn + 1, owner
            if owner == "assistant":
                result.append(AnswerTurn(turn, index, index + 1))
    return result


def said_by_user(messages: list[Mapping[str, Any]]) -> str:
    """Returns what the user says in a conversation, as one text."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def _parse(path: Path, number: int, line: bytes, encoder: BatchEncoder) -> tuple[list[dict], list[Turn]]:
    where = f"{path}:{number}"
    try:
        messages = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON", found=error, fix="write one conversation a line") from None
    try:
        turns = encoder.turns(messages)
        refuse_half_characters(turns)
    except MessageError as error:
        raise UserError(
            f"{where}: {error.field}", found=error.found, expected=error.expected, fix=error.fix
        ) from None
    return messages, turns
