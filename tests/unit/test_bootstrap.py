"""Intervals: against the closed form, against a plain loop of draws, and in undefined cases."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from snaketune.reporting.bootstrap import Interval, Ratios, compared, intervals


def one_figure(above, below):
    columns = (np.array(each, dtype=float)[:, None] for each in (above, below))
    return Ratios(("figure",), *columns)


def test_a_share_has_the_interval_of_the_normal_approximation():
    n, right = 2000, 600
    found = intervals(one_figure([1] * right + [0] * (n - right), [1] * n))["figure"]
    share = right / n
    error = 1.96 * math.sqrt(share * (1 - share) / n)
    assert found.value == share
    assert found.low == pytest.approx(share - error, abs=0.1 * error)
    assert found.high == pytest.approx(share + error, abs=0.1 * error)


def test_points_of_one_conversation_do_not_count_as_independent():
    """20 conversations with 50 points each, all right or all wrong, count as 20 points, not 1,000."""
    right = [50 * (number % 2) for number in range(20)]
    found = intervals(one_figure(right, [50] * 20))["figure"]
    error = 1.96 * math.sqrt(0.25 / 20)
    assert found.high - found.low == pytest.approx(2 * error, rel=0.15)


def test_a_ratio_agrees_with_a_plain_loop_of_draws():
    pick = random.Random(7)
    above = [pick.random() * 10 for _ in range(60)]
    below = [1 + pick.randrange(30) for _ in range(60)]
    found = intervals(one_figure(above, below), replicates=4000)["figure"]
    drawn = []
    for _ in range(4000):
        chosen = [pick.randrange(60) for _ in range(60)]
        drawn.append(sum(above[place] for place in chosen) / sum(below[place] for place in chosen))
    drawn.sort()
    width = drawn[3899] - drawn[99]
    assert found.value == pytest.approx(sum(above) / sum(below))
    assert found.low == pytest.approx(drawn[99], abs=0.08 * width)
    assert found.high == pytest.approx(drawn[3899], abs=0.08 * width)


def test_the_difference_is_paired():
    """Shared difficulty cancels out: the tuned loss is lower by 0.1 in every conversation."""
    pick = random.Random(1)
    tokens = [10 + pick.randrange(20) for _ in range(30)]
    base = [count * (1 + pick.random()) for count in tokens]
    tuned = [total - 0.1 * count for total, count in zip(base, tokens, strict=True)]
    one, other = one_figure(tuned, tokens), one_figure(base, tokens)
    alone, after, found = compared(other, one)["figure"]
    assert found == pytest.approx((-0.1, -0.1, -0.1))
    assert (alone, after) == (intervals(other)["figure"], intervals(one)["figure"])
    assert alone.high - alone.low > 0.1


def test_the_same_seed_gives_the_same_bounds_and_another_one_others():
    ratios = one_figure(range(40), [40] * 40)
    assert intervals(ratios) == intervals(ratios) != intervals(ratios, seed=5)


def test_many_conversations_are_drawn_in_pieces(monkeypatch):
    import snaketune.reporting.bootstrap

    ratios = one_figure(range(40), [40] * 40)
    whole = intervals(ratios)
    monkeypatch.setattr(snaketune.reporting.bootstrap, "_HELD", 7 * 40)
    assert intervals(ratios) == whole


@pytest.mark.parametrize(
    ("above", "below", "expected"),
    [
        ([], [], Interval(None, None, None)),
        ([0, 0], [0, 0], Interval(None, None, None)),
        ([3], [4], Interval(0.75, None, None)),
        ([1, 1], [1, 1], Interval(1.0, 1.0, 1.0)),
        # A draw of only the second conversation has a denominator of 0 and is left out.
        ([1, 0], [2, 0], Interval(0.5, 0.5, 0.5)),
    ],
)
def test_what_cannot_be_said_is_not_said(above, below, expected):
    assert intervals(one_figure(above, below))["figure"] == expected
