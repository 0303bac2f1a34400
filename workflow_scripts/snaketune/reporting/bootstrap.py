"""Confidence intervals by resampling conversations.

Points of one conversation are not independent, so whole conversations are drawn, with replacement and as many
as there are, and every figure is recomputed from the draw. The interval spans the 2.5th to the 97.5th
percentile (the percentile bootstrap of Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
13). The difference of two models uses the same draws for both, so the difficulty that they share cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

REPLICATES = 1000
SEED = 1024
_PERCENTILES = (2.5, 97.5)
# Counts in memory at once: 64 MB.
_HELD = 8_000_000


class Interval(NamedTuple):
    """A figure and the bounds of its 95% interval; None if undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Ratios:
    """Each conversation's contribution to figures of the form sum / sum.

    Attributes:
        names: The figures.
        above: Numerators, float64 (conversations, figures).
        below: Denominators, the same shape; a figure with a sum of 0 is undefined.
    """

    names: tuple[str, ...]
    above: np.ndarray
    below: np.ndarray


def loss_ratios(conversations: Mapping[str, list], name: str | None) -> Ratios:
    """Returns the held-out loss as a ratio.

    Args:
        conversations: As in the result of `snaketune.evaluation.scoring.score`.
        name: A dataset; None for all conversations.
    """
    own = [each for key in sorted(conversations) if name in (None, key) for each in conversations[key]]
    columns = np.array(own, dtype=np.float64).reshape(-1, 2)
    return Ratios(("loss",), columns[:, :1], columns[:, 1:])


def intervals(ratios: Ratios, replicates: int = REPLICATES, seed: int = SEED) -> dict[str, Interval]:
    """Returns each figure with its 95% interval.

    With fewer than two conversations there are no bounds.
    """
    return _intervals(ratios.names, *_drawn(ratios, replicates, seed))


def compared(
    base: Ratios, tuned: Ratios, replicates: int = REPLICATES, seed: int = SEED
) -> dict[str, tuple[Interval, Interval, Interval]]:
    """Returns each figure of base, tuned, and tuned - base, the latter with the paired interval.

    Args:
        base: The base model's; same figures and conversations as `tuned`, in the same order.
        tuned: The tuned model's.
        replicates: Number of draws.
        seed: Seed of the draws.
    """
    value, drawn, conversations = _drawn(base, replicates, seed)
    tuned_value, tuned_drawn, _ = _drawn(tuned, replicates, seed)
    columns = [
        _intervals(base.names, *pair, conversations).values()
        for pair in ((value, drawn), (tuned_value, tuned_drawn), (tuned_value - value, tuned_drawn - drawn))
    ]
    return dict(zip(base.names, zip(*columns, strict=True), strict=True))


def _drawn(ratios: Ratios, replicates: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns figures (figures,), those of each draw (replicates, figures), and the conversation count."""
    conversations = len(ratios.above)
    value = _ratio(ratios.above.sum(axis=0), ratios.below.sum(axis=0))
    generator = np.random.default_rng(seed)
    parts = []
    while conversations and replicates:
        some = min(replicates, max(1, _HELD // conversations))
        even = np.full(conversations, 1 / conversations)
        draws = generator.multinomial(conversations, even, size=some).astype(np.float64)
        parts.append(_ratio(draws @ ratios.above, draws @ ratios.below))
        replicates -= some
    return value, np.concatenate(parts) if parts else np.empty((0, len(value))), conversations


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)


def _intervals(names, value: np.ndarray, drawn: np.ndarray, conversations: int) -> dict[str, Interval]:
    result = {}
    for name, figure, draws in zip(names, value, drawn.T, strict=True):
        # A draw may have a denominator of 0, for example without a single call.
        draws = draws[~np.isnan(draws)]
        if np.isnan(figure):
            result[name] = Interval(None, None, None)
        elif conversations < 2 or not len(draws):
            result[name] = Interval(float(figure), None, None)
        else:
            result[name] = Interval(float(figure), *map(float, np.percentile(draws, _PERCENTILES)))
    return result
