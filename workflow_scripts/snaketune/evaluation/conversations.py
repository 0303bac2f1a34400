"""Held-out conversations, their origin, and the assistant's answers in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from snaketune.chat_format.chat_template import ChatTemplate, Turn
from snaketune.encoding.batch_encoder import BatchEncoder
from snaketune.evaluation.heldout import parse_line, read_lines
from snaketune.evaluation.languages import language_of


@dataclass(frozen=True)
class Conversation:
    """A conversation in the held-out folder.

    Attributes:
        dataset: Name of its dataset folder.
        file: Its file, relative to the held-out folder.
        line: Line number, from 1.
        sha256: Digest of the line's bytes, without surrounding white space.
        language: Taken from the dataset's name, or the script of the user's messages.
        messages: The messages.
        turns: The messages as turns of the chat template.
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
    """The messages that form one turn of the assistant.

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
        encoder: Splits messages into turns.
        max_samples: Maximum conversations per dataset; those whose lines have the smallest SHA-256 are kept.

    Raises:
        UserError: There are none, or a line is not a conversation.
    """
    result = []
    for line in read_lines(folder, max_samples):
        messages, turns = parse_line(line, encoder)
        language = language_of(line.dataset, said_by_user(messages))
        file = line.path.relative_to(folder).as_posix()
        result.append(Conversation(line.dataset, file, line.number, line.sha256, language, messages, turns))
    return result


def answer_turns(messages: list[Mapping[str, Any]], template: ChatTemplate) -> list[AnswerTurn]:
    """Returns the turns of the assistant.

    A turn is an assistant message, or a part of an assistant turn, with the parts attached to it.

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
        elif role.opens is None:  # otherwise it is written into the next turn
            turn, open_role = turn + 1, owner
            if owner == "assistant":
                result.append(AnswerTurn(turn, index, index + 1))
    return result


def said_by_user(messages: list[Mapping[str, Any]]) -> str:
    """Returns the user's messages, joined into one text."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")
