"""Counts kept while a file is tokenised. The tallies of a file's ranges add up to the tally of the file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from snaketune.encoding.signed_ids import count_trained
from snaketune.tokenized.bin_writer import Lines
from snaketune.tokenized.block_tokenizer import TokenizedBlock

LONGEST = 10
_SUMS = ("lines", "heldout", "quarantined", "tokens", "trained_tokens", "truncated")


class LengthHistogram:
    """Counts documents by length. Bin i holds lengths from 2**i to 2**(i+1) - 1 tokens."""

    def __init__(self, counts: list[int] | None = None) -> None:
        self._counts = np.zeros(63, dtype=np.int64)
        if counts:
            self._counts[: len(counts)] = counts

    def add(self, lengths: np.ndarray) -> None:
        """Adds documents: int64 array (documents,), tokens of each."""
        # frexp writes n as m * 2**e with 0.5 <= m < 1.
        bins = np.frexp(lengths.astype(np.float64))[1] - 1
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def merge(self, other: LengthHistogram) -> None:
        """Adds another histogram's counts."""
        self._counts += other._counts

    def as_json(self) -> dict[str, list[int]]:
        """Returns `edges` (powers of two) and `counts` (one element fewer)."""
        used = np.flatnonzero(self._counts)
        bins = int(used[-1]) + 1 if len(used) else 0
        return {"edges": [2**i for i in range(bins + 1)], "counts": self._counts[:bins].tolist()}


class Tally:
    """Sums over lines. Tokens and lengths cover only the train documents.

    Attributes:
        sums: lines, heldout, quarantined, tokens, trained_tokens, truncated.
        samples: Number of train documents.
        source_bytes: Bytes of the lines.
        untrained: Conversations that lost all their trained tokens by the cut; None if the record of a range, made by
            an earlier release, does not tell.
        longest_samples: (tokens, document number from 0, line number from 1) of the longest documents,
            longest first.
        counts: Counts of the encoder.
        histogram: Histogram of the lengths of train documents.
    """

    def __init__(self) -> None:
        self.sums = dict.fromkeys(_SUMS, 0)
        self.samples = self.source_bytes = 0
        self.untrained: int | None = 0
        self.longest_samples: list[tuple[int, int, int]] = []
        self.counts: dict[str, int] = {}
        self.histogram = LengthHistogram()

    def add(self, lines: int, block: TokenizedBlock, train: Lines, valid: Lines | None) -> None:
        """Adds a block of `lines` source lines, which became `train` and `valid`."""
        trained = block.trained_tokens
        if valid is not None:
            for line in valid.data.splitlines():
                trained -= count_trained(line)
        self._add_longest(train.lengths, block.lines if valid is None else block.lines[~block.for_valid])
        added = (
            *(lines, block.heldout, len(block.quarantined)),
            *(int(train.lengths.sum()), trained, block.truncated),
        )
        for key, value in zip(_SUMS, added, strict=True):
            self.sums[key] += value
        self.source_bytes += block.source_bytes
        self._add_untrained(block.untrained)
        self.samples += len(train.lengths)
        self._count(block.counts)
        self.histogram.add(train.lengths)

    def _add_longest(self, lengths: np.ndarray, lines: np.ndarray) -> None:
        """Updates the longest documents from a block: int64 arrays (documents,) of tokens and of lines in it."""
        least = self.longest_samples[-1][0] if len(self.longest_samples) == LONGEST else 0
        places = np.flatnonzero(lengths > least)
        places = places[np.argsort(-lengths[places], kind="stable")[:LONGEST]].tolist()
        first = self.sums["lines"] + 1
        self._keep_longest((int(lengths[i]), self.samples + i, first + int(lines[i])) for i in places)

    def _keep_longest(self, more: Iterable[tuple[int, int, int]]) -> None:
        found = sorted([*self.longest_samples, *more], key=lambda each: (-each[0], each[1]))
        self.longest_samples = found[:LONGEST]

    def _count(self, counts: dict[str, int]) -> None:
        for key, value in counts.items():
            if key != "quarantined":
                self.counts[key] = self.counts.get(key, 0) + value

    def _add_untrained(self, more: int | None) -> None:
        self.untrained = None if self.untrained is None or more is None else self.untrained + more

    def as_json(self) -> dict[str, Any]:
        """Returns the tally in the form that `merged` takes."""
        return {
            "sums": self.sums,
            "samples": self.samples,
            "source_bytes": self.source_bytes,
            "untrained": self.untrained,
            "longest_samples": self.longest_samples,
            "counts": self.counts,
            "histogram": self.histogram.as_json()["counts"],
        }

    @classmethod
    def merged(cls, tallies: list[dict[str, Any]]) -> Tally:
        """Returns the tally of consecutive ranges of a file, given their `as_json` values."""
        result = cls()
        for tally in tallies:
            result._keep_longest(
                (tokens, sample + result.samples, line + result.sums["lines"])
                for tokens, sample, line in tally["longest_samples"]
            )
            result.samples += tally["samples"]
            for key in _SUMS:
                result.sums[key] += tally["sums"][key]
            result.source_bytes += tally["source_bytes"]
            # Not among the sums, which are in the manifest: its digest must not change.
            result._add_untrained(tally.get("untrained", None if tally["sums"]["truncated"] else 0))
            result._count(tally["counts"])
            result.histogram.merge(LengthHistogram(tally["histogram"]))
        return result
