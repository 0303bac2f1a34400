"""`mask: exact`: the ids of the whole conversation, each trained on when a character of it is.

XTuner encodes begin, content and end together and cuts the first `len(begin ids)` and the last `len(end ids)` off.
Where the tokenizer merges across such a boundary, that cuts the wrong ids. Here the boundary is looked up in the text: a
token counts as trained when one of its characters does.

Most turns need no look-up. When their ids begin with those of the begin and end with those of the end, the boundaries lie
between tokens, because a token always stands for the same characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from snaketune.chat_format.chat_template import Turn
from snaketune.encoding.signed_ids import TokenSpan, trained_mask


class Span(NamedTuple):
    """A stretch of a conversation's text."""

    text: str
    trained: bool


def spans_of(turn: Turn) -> list[Span]:
    """Returns what `exact` trains on in a turn: what each message asks for, and the end with the last of them."""
    if turn.parts is None:
        spans = [Span(turn.content, turn.content_trained)]
    else:
        spans = [Span(part.text, part.trained) for part in turn.parts]
    trained = spans[-1].trained if spans else False
    return [Span(turn.prefix, False), *spans, Span(turn.suffix, trained and turn.suffix_trained)]


def one_answer(turn: Turn) -> bool | None:
    """Returns whether the content is trained on, None where part of it is and part is not."""
    if turn.parts is None:
        return turn.content_trained
    answers = {part.trained for part in turn.parts}
    return answers.pop() if len(answers) == 1 else None


def encode_spans(tokenizer: Tokenizer, texts: Sequence[Sequence[Span]]) -> list[list[TokenSpan]]:
    """Encodes texts given as spans, each as one text.

    Args:
        tokenizer: Must not trim offsets (see `snaketune.encoding.control_tokens.without_trimming`).
        texts: The spans of each text.
    """
    joined = ["".join(span.text for span in spans) for spans in texts]
    encodings = tokenizer.encode_batch(joined, add_special_tokens=False)
    return [_pieces(each.ids, each.offsets, spans) for each, spans in zip(encodings, texts, strict=True)]


def _pieces(ids: list[int], offsets: list[tuple[int, int]], spans: Sequence[Span]) -> list[TokenSpan]:
    if not ids:
        return []
    lengths = [len(span.text) for span in spans]
    # trained_before[i]: how many of the first i characters are trained on.
    trained_before = np.zeros(sum(lengths) + 1, dtype=np.int64)
    trained_before[1:] = np.cumsum(np.repeat([span.trained for span in spans], lengths))
    boundaries = np.array(offsets, dtype=np.int64)
    # A token that a normalizer made of nothing stands for no character: it goes with the one it stands before.
    stop = np.minimum(np.maximum(boundaries[:, 1], boundaries[:, 0] + 1), len(trained_before) - 1)
    trained = (trained_before[stop] > trained_before[boundaries[:, 0]]).tolist()
    grouped = groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
    return [TokenSpan([token for token, _ in pairs], answer) for answer, pairs in grouped]


def difference(exact: Sequence[TokenSpan], compat: Sequence[TokenSpan]) -> int:
    """Returns at how many places ids or masks differ; what one has more counts as differing."""
    one, other = (
        list(
            zip(
                [token for piece in pieces for token in piece.ids],
                trained_mask(pieces, is_exact),
                strict=True,
            )
        )
        for pieces, is_exact in ((exact, True), (compat, False))
    )
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))
