"""Figures of a tool call evaluation, with intervals: by dataset and language, and base against tuned.

Points that call a tool and points that do not are sampled at different rates (half and half). A figure over
both weights each point by the number of points it represents, so that precision is that of the whole held-out
data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from snaketune.common.cli import UserError
from snaketune.evaluation.call_verdicts import STAGES
from snaketune.reporting.bootstrap import Interval, Ratios, compared, intervals

# (verdicts of a point, True if its reference calls) -> (numerator, denominator); a denominator of 0 skips the
# point.
_Ratio = Callable[[Mapping[str, Any], bool], tuple[float, float]]


def _passed(stage: str) -> _Ratio:
    """Share of the calls made that pass a check and all earlier ones."""
    later = (None, *STAGES[STAGES.index(stage) + 1 :])
    return lambda verdict, calls: (verdict["failed"] in later, 1) if verdict["called"] else (0, 0)


def _where_called(value: Callable[[Mapping[str, Any]], float | None]) -> _Ratio:
    """Mean over the points where the reference calls; a value of None skips the point."""

    def ratio(verdict: Mapping[str, Any], calls: bool) -> tuple[float, float]:
        found = value(verdict) if calls else None
        return (0, 0) if found is None else (found, 1)

    return ratio


METRICS: dict[str, _Ratio] = {
    "recall": lambda verdict, calls: (verdict["called"] and calls, calls),
    "precision": lambda verdict, calls: (verdict["called"] and calls, verdict["called"]),
    "f1": lambda verdict, calls: (2 * (verdict["called"] and calls), verdict["called"] + calls),
    "control_tokens": _passed("control_tokens"),
    "json": _passed("json"),
    "tool_offered": _passed("tool"),
    "well_formed": _passed("arguments"),
    "exact": _where_called(lambda verdict: verdict["exact"]),
    "name": _where_called(lambda verdict: verdict["name"]),
    "argument_f1": _where_called(lambda verdict: verdict["argument_f1"]),
    "stopped": lambda verdict, calls: (verdict["stopped"], 1),
    "reference_well_formed": _where_called(lambda verdict: verdict["reference_failed"] is None),
}
SCOPES = ("all", "dataset", "language")
Scope = tuple[str, str]  # ("all", ""), ("dataset", name) or ("language", code)


def summarize(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns all figures of one model with their intervals.

    Args:
        result: Output of evaluate_tool_calls.py, at least `selection`, `points`, `losses` and `plain_text`.

    Returns:
        [{"scope", "name", "metric", "count", "conversations", "value", "low", "high"}]: `scope` is all,
        dataset or language, and `name` names it; `metric` is one of `METRICS`, `loss.<role>` or
        `loss.plain_text` (nats per token); `count` is the number of points, or of tokens, behind the figure.
        A value of None is undefined.
    """
    return [
        {**_head(scope, ratios, counts, place), **interval._asdict()}
        for (_, scope), (ratios, counts) in _evidence(result).items()
        for place, interval in enumerate(intervals(ratios).values())
    ]


def comparison_rows(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a table of base against tuned.

    Args:
        base: Output of evaluate_tool_calls.py for the base model.
        tuned: The same for the tuned model.

    Returns:
        As `summarize` (`count` is the tuned model's), with `base`, `tuned` and `difference`, each an
        `Interval`, in place of value, low and high. The difference is tuned - base on the same draws of
        conversations.

    Raises:
        UserError: The two cover different points.
    """
    _check_pair(base, tuned)
    before, after = _evidence(base), _evidence(tuned)
    rows = []
    for key, (ratios, counts) in after.items():
        for place, columns in enumerate(compared(before[key][0], ratios).values()):
            three = dict(zip(("base", "tuned", "difference"), columns, strict=True))
            rows.append(_head(key[1], ratios, counts, place) | three)
    return rows


def perplexity(loss: Interval) -> Interval:
    """Returns the perplexity of a loss in nats. Applies to the bounds too, since exp is monotone."""
    return Interval(*(None if each is None else math.exp(min(each, 700.0)) for each in loss))


def _head(scope: Scope, ratios: Ratios, counts: Sequence[int], place: int) -> dict[str, Any]:
    return {
        "scope": scope[0],
        "name": scope[1],
        "metric": ratios.names[place],
        "count": int(counts[place]),
        "conversations": len(ratios.above),
    }


def differing(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[str]:
    """Returns the keys in which two evaluations differ; comparable evaluations have none."""
    same = (
        "heldout_sha256",
        "tokenizer_sha256",
        "template",
        "mask",
        "control_tokens",
        "selection",
        "max_samples",
        "max_new_tokens",
        "max_length",
        "plain_text_sha256",
    )
    return [key for key in same if base.get(key) != tuned.get(key)]


def _check_pair(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    for key in differing(base, tuned)[:1]:
        raise UserError(
            f"the two tool call evaluations are not comparable: {key} differs",
            found=f"{base[key]} and {tuned[key]}",
            fix="run evaluate_tool_calls.py for both models with the same options and conversations",
        )


# Points, losses and plain text blocks each draw from their own conversations (or blocks).
_Entries = dict[Scope, dict[str, list[tuple[str, float, float, int]]]]


def _evidence(result: Mapping[str, Any]) -> dict[tuple[int, Scope], tuple[Ratios, np.ndarray]]:
    """Returns, by kind and scope, each conversation's share in each figure, and each figure's count."""
    all_entries = (_point_entries(result), _loss_entries(result), _plain_text_entries(result))
    return {
        (kind, scope): _ratios(conversations)
        for kind, entries in enumerate(all_entries)
        for scope, conversations in entries.items()
    }


def _point_entries(result: Mapping[str, Any]) -> _Entries:
    weights = {kind: each["available"] / max(each["tried"], 1) for kind, each in result["selection"].items()}
    entries: _Entries = {}
    for point in result["points"]:
        calls, weight = point["kind"] == "call", weights[point["kind"]]
        found = []
        for metric, ratio in METRICS.items():
            above, below = ratio(point["verdicts"], calls)
            found.append((metric, weight * above, weight * below, int(below > 0)))
        _add(entries, point, point["point"].rpartition("#")[0], found)
    return entries


def _loss_entries(result: Mapping[str, Any]) -> _Entries:
    entries: _Entries = {}
    for each in result["losses"]:
        found = [(f"loss.{role}", *sums, sums[1]) for role, sums in each["roles"].items()]
        _add(entries, each, each["conversation"], found)
    return entries


def _plain_text_entries(result: Mapping[str, Any]) -> _Entries:
    blocks = {
        f"{number:09}": [("loss.plain_text", *sums, sums[1])]
        for number, sums in enumerate(result["plain_text"])
    }
    return {("all", ""): blocks} if blocks else {}


def _add(entries: _Entries, place: Mapping[str, Any], conversation: str, found: list[tuple]) -> None:
    for scope in (("all", ""), ("dataset", place["dataset"]), ("language", place["language"])):
        entries.setdefault(scope, {}).setdefault(conversation, []).extend(found)


def _ratios(conversations: Mapping[str, list[tuple[str, float, float, int]]]) -> tuple[Ratios, np.ndarray]:
    names = list(dict.fromkeys(name for found in conversations.values() for name, *_ in found))
    if names[0] not in METRICS:
        names.sort()
    column = {name: index for index, name in enumerate(names)}
    above, below = (np.zeros((len(conversations), len(column))) for _ in range(2))
    counts = np.zeros(len(column), dtype=np.int64)
    for row, conversation in enumerate(sorted(conversations)):
        for name, up, down, count in conversations[conversation]:
            above[row, column[name]] += up
            below[row, column[name]] += down
            counts[column[name]] += count
    return Ratios(tuple(names), above, below), counts
