"""Tool call section of the report: tables of base and tuned with intervals, and answers side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from snaketune.reporting.tool_call_tables import SCOPES, comparison_rows, perplexity

_EXAMPLES = 6


def tool_call_summary(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the template's variables for two files of evaluate_tool_calls.py.

    Returns:
        calls: Groups of rows of `comparison_rows` on calls: all conversations first, then each dataset and
            language.
        losses: The same for the loss by role, each row with `base_perplexity` and `tuned_perplexity`.
        plain_text: The row on plain text; None if it was not measured.
        examples: Points with `base` and `tuned` answers; see `choose_examples`.
        selection: Counts of available and evaluated points, by kind.

    Raises:
        UserError: The two files cover different points.
    """
    rows = comparison_rows(base, tuned)
    for row in rows:
        if row["metric"].startswith("loss."):
            row["role"] = row["metric"].removeprefix("loss.")
            row |= {f"{label}_perplexity": perplexity(row[label]).value for label in ("base", "tuned")}
    plain = [row for row in rows if row.get("role") == "plain_text"]
    roles = [row for row in rows if "role" in row and row not in plain]
    return {
        "calls": _groups([row for row in rows if "role" not in row]),
        "losses": _groups(roles),
        "plain_text": plain[0] if plain else None,
        "examples": choose_examples(base["points"], tuned["points"]),
        "selection": tuned["selection"],
    }


def _groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = sorted(rows, key=lambda row: (SCOPES.index(row["scope"]), row["name"]))
    return [
        {"scope": scope, "name": name, "rows": list(own)}
        for (scope, name), own in groupby(rows, lambda row: (row["scope"], row["name"]))
    ]


def choose_examples(base: list[dict[str, Any]], tuned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chooses points to show, half of which call a tool.

    Points where the models behaved differently come first. Datasets take turns; repeated questions come last.
    """
    asked, shown = Counter(), Counter()
    ranked = []
    for before, after in zip(base, tuned, strict=True):
        same = before["verdicts"] == after["verdicts"]
        question, turn = (after["kind"], after["question"]), (after["kind"], same, after["dataset"])
        ranked.append(((asked[question], same, shown[turn]), (before, after)))
        asked[question] += 1
        shown[turn] += 1
    pairs = [pair for _, pair in sorted(ranked, key=lambda each: each[0])]
    calls, texts = ([pair for pair in pairs if pair[1]["kind"] == kind] for kind in ("call", "text"))
    half = _EXAMPLES // 2
    chosen = calls[: max(half, _EXAMPLES - len(texts))]
    chosen += texts[: _EXAMPLES - len(chosen)]
    return [after | {"base": before, "tuned": after} for before, after in chosen]
