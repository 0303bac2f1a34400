"""Confidence intervals by resampling conversations.

Points of one conversation are not independent, so conversations are drawn, with replacement and as many as there are,
and every figure is computed again from those drawn. The 2.5th and 97.5th percentile of it are the interval (the
percentile bootstrap of Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). The difference of
two models is computed on the same draws: what makes a conversation hard for both cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

REPLICATES = 1000
SEED = 1024
_PERCENTILES = (2.5, 97.5)
# Draws that are held at once: 64 MB.
_HELD = 8_000_000


class Interval(NamedTuple):
    """A figure and the bounds of its 95% interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Ratios:
    """What each conversation adds to figures of the form sum / sum.

    Attributes:
        names: The figures.
        above: float64 (conversations, figures).
        below: The same shape; a figure whose sum here is 0 is not defined.
    """

    names: tuple[str, ...]
    above: np.ndarray
    below: np.ndarray


def loss_ratios(conversations: Mapping[str, list], name: str | None) -> Ratios:
    """Returns the held-out loss as a ratio, of all conversations or of a dataset's, as `snaketune.evaluation.scoring` writes them."""
    own = [each for key in sorted(conversations) if name in (None, key) for each in conversations[key]]
    columns = np.array(own, dtype=np.float64).reshape(-1, 2)
    return Ratios(("loss",), columns[:, :1], columns[:, 1:])


def intervals(ratios: Ratios, replicates: int = REPLICATES, seed: int = SEED) -> dict[str, Interval]:
    """Returns each figure with its 95% interval.

    Without two conversations there are no bounds: one says nothing about others.
    """
    return _intervals(ratios.names, *_drawn(ratios, replicates, seed))


def compared(
    base: Ratios, tuned: Ratios, replicates: int = REPLICATES, seed: int = SEED
) -> dict[str, tuple[Interval, Interval, Interval]]:
    """Returns each figure of two models, base and tuned, and tuned - base with the paired interval.

    Args:
        base: Has the same figures and conversations, in the same order, as `tuned`.
        tuned: The other model's.
        replicates: How often conversations are drawn.
        seed: Of the draws.
    """
    value, drawn, conversations = _drawn(base, replicates, seed)
    tuned_value, tuned_drawn, _ = _drawn(tuned, replicates, seed)
    columns = [
        _intervals(base.names, *pair, conversations).values()
        for pair in ((value, drawn), (tuned_value, tuned_drawn), (tuned_value - value, tuned_drawn - drawn))
    ]
    return dict(zip(base.names, zip(*columns, strict=True), strict=True))


def _drawn(ratios: Ratios, replicates: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the figures (figures,), those of the draws (replicates, figures), and the number of conversations."""
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
        # A draw may hold nothing to divide by, such as no call.
        draws = draws[~np.isnan(draws)]
        if np.isnan(figure):
            result[name] = Interval(None, None, None)
        elif conversations < 2 or not len(draws):
            result[name] = Interval(float(figure), None, None)
        else:
            result[name] = Interval(float(figure), *map(float, np.percentile(draws, _PERCENTILES)))
    return result
