"""What is counted while a file is tokenised; the tallies of its ranges add up to its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from ftdp.block_tokenizer import TokenizedBlock
from ftdp.piece import count_trained
from ftdp.tokenized_writer import Lines

_SUMS = ("lines", "heldout", "quarantined", "tokens", "trained_tokens", "truncated")


class LengthHistogram:
    """Counts conversations by length: bin i holds lengths from 2**i to below 2**(i+1) tokens."""

    def __init__(self, counts: list[int] | None = None) -> None:
        self._counts = np.zeros(63, dtype=np.int64)
        if counts:
            self._counts[: len(counts)] = counts

    def add(self, lengths: np.ndarray) -> None:
        """Adds conversations, int64 array (samples,) of tokens."""
        # frexp writes n as m * 2**e with 0.5 <= m < 1.
        bins = np.frexp(lengths.astype(np.float64))[1] - 1
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def merge(self, other: LengthHistogram) -> None:
        """Adds another histogram's counts."""
        self._counts += other._counts

    def as_json(self) -> dict[str, list[int]]:
        """Returns `edges`, powers of two, and `counts`, one less."""
        used = np.flatnonzero(self._counts)
        bins = int(used[-1]) + 1 if len(used) else 0
        return {"edges": [2**i for i in range(bins + 1)], "counts": self._counts[:bins].tolist()}


class Tally:
    """Sums over lines. Tokens and lengths are those of the train samples.

    Attributes:
        sums: lines, heldout, quarantined, tokens, trained_tokens, truncated.
        source_bytes: Bytes of the lines.
        longest: Tokens of the longest train sample.
        counts: What the encoder counts.
        histogram: Of the lengths of the train samples.
    """

    def __init__(self) -> None:
        self.sums = dict.fromkeys(_SUMS, 0)
        self.source_bytes = self.longest = 0
        self.counts: dict[str, int] = {}
        self.histogram = LengthHistogram()

    def add(self, lines: int, block: TokenizedBlock, train: Lines, valid: Lines | None) -> None:
        """Adds a block of `lines` source lines, which became `train` and `valid`."""
        trained = block.trained_tokens
        if valid is not None:
            for line in valid.data.splitlines():
                trained -= count_trained(line)
        added = (
            *(lines, block.heldout, len(block.quarantined)),
            *(int(train.lengths.sum()), trained, block.truncated),
        )
        for key, value in zip(_SUMS, added, strict=True):
            self.sums[key] += value
        self.source_bytes += block.source_bytes
        self.longest = max(self.longest, int(train.lengths.max(initial=0)))
        self._count(block.counts)
        self.histogram.add(train.lengths)

    def _count(self, counts: dict[str, int]) -> None:
        for key, value in counts.items():
            if key != "quarantined":
                self.counts[key] = self.counts.get(key, 0) + value

    def as_json(self) -> dict[str, Any]:
        """Returns what `merged` takes."""
        return {
            "sums": self.sums,
            "source_bytes": self.source_bytes,
            "longest": self.longest,
            "counts": self.counts,
            "histogram": self.histogram.as_json()["counts"],
        }

    @classmethod
    def merged(cls, tallies: list[dict[str, Any]]) -> Tally:
        """Returns the tally of several that `as_json` gave."""
        result = cls()
        for tally in tallies:
            for key in _SUMS:
                result.sums[key] += tally["sums"][key]
            result.source_bytes += tally["source_bytes"]
            result.longest = max(result.longest, tally["longest"])
            result._count(tally["counts"])
            result.histogram.merge(LengthHistogram(tally["histogram"]))
        return result
