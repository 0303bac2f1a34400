"""`mask: exact`: encodes the whole conversation and trains on each id with a trained character.

XTuner encodes prefix, content and suffix together and cuts off the first `len(prefix ids)` and the last
`len(suffix ids)` ids. If the tokenizer merges across an edge of the content, that cuts the wrong ids. `exact` finds
the edges in the text instead: a token is trained on if any of its characters is.

Most turns need no search. If their ids start with the prefix's ids and end with the suffix's ids, the edges fall
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
    """A stretch of a conversation's text that is trained on or not."""

    text: str
    trained: bool


def spans_of(turn: Turn) -> list[Span]:
    """Returns a turn's text as spans. Each message decides for its text, and the last one for the suffix too."""
    if turn.parts is None:
        spans = [Span(turn.content, turn.content_trained)]
    else:
        spans = [Span(part.text, part.trained) for part in turn.parts]
    trained = spans[-1].trained if spans else False
    return [Span(turn.prefix, False), *spans, Span(turn.suffix, trained and turn.suffix_trained)]


def one_answer(turn: Turn) -> bool | None:
    """True if the whole content is trained on, False if none of it is, None if only part is."""
    if turn.parts is None:
        return turn.content_trained
    answers = {part.trained for part in turn.parts}
    return answers.pop() if len(answers) == 1 else None


def encode_spans(tokenizer: Tokenizer, texts: Sequence[Sequence[Span]]) -> list[list[TokenSpan]]:
    """Encodes texts given as spans. Each text is encoded as a whole.

    Args:
        tokenizer: A tokenizer that does not trim offsets (see `snaketune.encoding.control_tokens.without_trimming`).
        texts: The spans of each text.
    """
    joined = ["".join(span.text for span in spans) for spans in texts]
    encodings = tokenizer.encode_batch(joined, add_special_tokens=False)
    return [_pieces(each.ids, each.offsets, spans) for each, spans in zip(encodings, texts, strict=True)]


def _pieces(ids: list[int], offsets: list[tuple[int, int]], spans: Sequence[Span]) -> list[TokenSpan]:
    if not ids:
        return []
    lengths = [len(span.text) for span in spans]
    # trained_before[i]: number of trained characters among the first i.
    trained_before = np.zeros(sum(lengths) + 1, dtype=np.int64)
    trained_before[1:] = np.cumsum(np.repeat([span.trained for span in spans], lengths))
    boundaries = np.array(offsets, dtype=np.int64)
    # A token that the normalizer inserted covers no character. Count it with the next character.
    stop = np.minimum(np.maximum(boundaries[:, 1], boundaries[:, 0] + 1), len(trained_before) - 1)
    trained = (trained_before[stop] > trained_before[boundaries[:, 0]]).tolist()
    grouped = groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
    return [TokenSpan([token for token, _ in pairs], answer) for answer, pairs in grouped]


def difference(exact: Sequence[TokenSpan], compat: Sequence[TokenSpan]) -> int:
    """Returns at how many positions ids or masks differ. Extra ids of the longer sequence count as differing."""
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
