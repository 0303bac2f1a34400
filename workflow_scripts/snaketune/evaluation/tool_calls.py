"""Tests tool calling: the model answers greedily at turns of held-out conversations, given everything before.

A point is an assistant turn with a loss in training. Its prompt is the ids that training would see before it.
If the reference calls a tool, the answer should be that call; otherwise it should not call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from snaketune.chat_format.chat_template import Turn
from snaketune.common.progress import Progress
from snaketune.encoding.batch_encoder import BatchEncoder
from snaketune.encoding.signed_ids import signed_ids
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.evaluation.call_format import Call, CallReader
from snaketune.evaluation.call_verdicts import Offered, offered_tools, verdicts
from snaketune.evaluation.conversations import AnswerTurn, Conversation, answer_turns
from snaketune.settings.schema import default_of

KINDS = ("call", "text")
_SHOWN = 500


@dataclass(frozen=True)
class Point:
    """An assistant turn that the model has to answer.

    Attributes:
        conversation: The conversation.
        answer: The turn in it.
        kind: "call" if the reference calls a tool, else "text".
        prompt: The ids before the answer, including the prefix of its turn.
        references: The calls of the reference.
        offered: The tools that the answer may call.
    """

    conversation: Conversation
    answer: AnswerTurn
    kind: str
    prompt: list[int]
    references: list[Call]
    offered: Offered

    @property
    def name(self) -> str:
        """Its location: file, line and index of the message."""
        return f"{self.conversation.place}#{self.answer.start}"


def choose_points(
    conversations: Sequence[Conversation], encoder: BatchEncoder, max_points: int, max_length: int
) -> tuple[list[Point], dict[str, dict[str, int]]]:
    """Chooses points, half of which call a tool; if one kind has too few, the other fills in.

    Points with the smallest SHA-256 of line and position come first, so that the choice depends neither on
    the order of the files nor on other lines.

    Args:
        conversations: Held-out conversations.
        encoder: The encoder that split them into turns.
        max_points: Maximum points in total.
        max_length: Points with a longer prompt are skipped.

    Returns:
        The points in the order of the conversations, and counts by kind: candidates (`available`), candidates
        examined (`tried`), those of them that are too long (`too_long`), and points kept (`points`).
    """
    waiting: dict[str, list[tuple[bytes, int, AnswerTurn]]] = {kind: [] for kind in KINDS}
    for number, conversation in enumerate(conversations):
        for answer in answer_turns(conversation.messages, encoder.template):
            if _is_trained(conversation.turns[answer.turn]):
                digest = hashlib.sha256(f"{conversation.sha256}#{answer.start}".encode()).digest()
                kind = KINDS[not _calls_of(conversation, answer)]
                waiting[kind].append((digest, number, answer))
    half = max_points // 2
    calls, texts = (len(waiting[kind]) for kind in KINDS)
    wanted = {"call": max(max_points - half, max_points - texts), "text": max(half, max_points - calls)}
    points: list[tuple[int, Point]] = []
    counts = {}
    for kind, candidates in waiting.items():
        candidates.sort(key=lambda candidate: candidate[0])
        kept, tried = [], 0
        for _, number, answer in candidates:
            if len(kept) == wanted[kind]:
                break
            tried += 1
            point = _point(conversations[number], answer, kind, encoder)
            if len(point.prompt) <= max_length:
                kept.append((number, point))
        counts[kind] = {
            "available": len(candidates),
            "tried": tried,
            "too_long": tried - len(kept),
            "points": len(kept),
        }
        points += kept
    points.sort(key=lambda each: (each[0], each[1].answer.start))
    return [point for _, point in points], counts


def answer_points(
    model,
    points: Sequence[Point],
    tokenizer: ExtendedTokenizer,
    max_new_tokens: int,
    batch_tokens: int = default_of("tool_calls.batch_tokens"),
) -> list[dict[str, Any]]:
    """Generates the model's answers and judges them.

    BOS is suppressed, as in `snaketune.evaluation.generation`; suppressions are counted.

    Args:
        model: A causal language model in eval mode.
        points: From `choose_points`.
        tokenizer: The extended tokenizer.
        max_new_tokens: Maximum tokens of an answer.
        batch_tokens: Maximum ids of a padded batch, answers included.

    Returns:
        Per point: its location, the reference, the prediction, and the verdicts (see
        `call_verdicts.verdicts`).
    """
    from snaketune.evaluation.answering import generate_answers

    reader = CallReader(tokenizer)
    end = tokenizer.end_of_turn_id
    stop_ids = {end, tokenizer.eos_token_id} - {None}
    suppress = {tokenizer.bos_token_id} - {None} - stop_ids if tokenizer.template.bos else set()
    progress = Progress("points", len(points))
    answers = generate_answers(
        model,
        [point.prompt for point in points],
        stop_ids,
        max_new_tokens,
        suppress=suppress,
        batch_tokens=batch_tokens,
        on_answer=lambda place, answer: progress.add("tool calls", points=1),
    )
    return [
        judge_point(point, answer.ids, end, reader) | {"bos_suppressed": answer.suppressed}
        for point, answer in zip(points, answers, strict=True)
    ]


def judge_point(point: Point, ids: Sequence[int], end_of_turn_id: int, reader: CallReader) -> dict[str, Any]:
    """Returns the record of the answer to a point.

    Args:
        point: The point.
        ids: The answer, including the stop id if there is one.
        end_of_turn_id: The id that should end an answer.
        reader: Parses answers in the chat template.
    """
    conversation, (_, start, stop) = point.conversation, point.answer
    stopped = bool(ids) and ids[-1] == end_of_turn_id
    _, calls = reader.read(ids[:-1] if stopped else ids)
    before = conversation.messages[start - 1]["content"] if start else ""
    return {
        "point": point.name,
        "dataset": conversation.dataset,
        "language": conversation.language,
        "kind": point.kind,
        "prompt_tokens": len(point.prompt),
        "tokens": len(ids),
        "question": before[-_SHOWN:],
        "tools": sorted(point.offered.tools),
        "reference": _reference_text(conversation.messages[start:stop]),
        "prediction": reader.text(ids),
        "verdicts": verdicts(calls, point.references, point.offered, stopped),
    }


def _point(conversation: Conversation, answer: AnswerTurn, kind: str, encoder: BatchEncoder) -> Point:
    # Of the answer's own turn, the prompt contains only the prefix.
    prefix = Turn(conversation.turns[answer.turn].prefix, "", "", False, False)
    turns = [*conversation.turns[: answer.turn], prefix]
    prompt = [abs(token) for token in signed_ids(encoder.encode_turns([turns])[0])]
    calls = _calls_of(conversation, answer)
    named = bool(calls) and encoder.template.roles["tool"].named is not None
    return Point(
        conversation,
        answer,
        kind,
        prompt,
        [Call(message.get("name") if named else None, message["content"].strip()) for message in calls],
        offered_tools(conversation.messages, answer.start),
    )


def _calls_of(conversation: Conversation, answer: AnswerTurn) -> list[dict[str, Any]]:
    return [
        message for message in conversation.messages[answer.start : answer.stop] if message["role"] == "tool"
    ]


def _reference_text(messages: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns the messages of the reference, as in the data."""
    return [
        {key: message[key] for key in ("role", "name", "content") if key in message} for message in messages
    ]


def _is_trained(turn: Turn) -> bool:
    return turn.content_trained if turn.parts is None else any(part.trained for part in turn.parts)
