"""Ids that are trained on, or not, and how a `.bin` file spells them.

A `.bin` file negates what is not trained on. Id 0 has no negative: XTuner never trains on it, and so does `mask: compat`.
With `mask: exact` a 0 that is trained on is written `-0`, which is JSON and which XTuner reads as 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import orjson


class TokenSpan(NamedTuple):
    """Consecutive ids that are trained on all alike.

    Attributes:
        ids: The ids, still unsigned.
        trained: False negates them in the file.
        written: How the file spells them, where that is known already.
    """

    ids: list[int]
    trained: bool
    written: bytes | None = None

    def write(self, exact: bool = False) -> bytes:
        """Returns the ids as `json.dumps` writes them, without brackets; negated where they are not trained on.

        `exact` writes id 0 as `-0` where it is trained on. No id is written with a leading zero, so `-0` is nothing else.

        Works on bytes: orjson and two replacements cost about a tenth of what `json.dumps` of a negated list does.
        """
        if self.written is not None:
            return self.written
        if not self.ids:
            return b""
        text = orjson.dumps(self.ids)[1:-1]
        if self.trained:
            text = text.replace(b",", b", ")
            if not exact:
                return text
            text = text.replace(b" 0", b" -0")
            return b"-" + text if text.startswith(b"0") else text
        text = b"-" + text.replace(b",", b", -")
        return text.replace(b"-0", b"0") if b"-0" in text else text


def trained_mask(spans: Iterable[TokenSpan], exact: bool, max_length: int | None = None) -> list[bool]:
    """Returns for each id whether it is trained on, as reading the `.bin` file tells, cut at `max_length`."""
    mask = [span.trained and (exact or token != 0) for span in spans for token in span.ids]
    return mask[:max_length]


def count_trained(line: bytes) -> int:
    """Returns how many ids of a line of a `.bin` file are trained on."""
    return sum(token > 0 for token in orjson.loads(line)["tokens"]) + line.count(b"-0")


def signed_ids(spans: Iterable[TokenSpan], max_length: int | None = None) -> list[int]:
    """Joins spans to signed ids, cut at `max_length`."""
    ids: list[int] = []
    for span in spans:
        ids += span.ids if span.trained else [-token for token in span.ids]
    return ids[:max_length]
