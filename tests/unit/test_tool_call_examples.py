"""The report shows the most telling of hundreds of answers."""

from __future__ import annotations

from snaketune.reporting.tool_call_report import choose_examples


def points(called: list[bool]) -> list[dict]:
    """Ten call and ten text points of two datasets; the first three of each dataset share a question."""
    return [
        {
            "kind": kind,
            "dataset": dataset,
            "question": f"{dataset} {max(0, number - 2)}",
            "number": number,
            "verdicts": {"called": called[number]},
        }
        for kind in ("call", "text")
        for dataset in ("a", "b")
        for number in range(5)
    ]


def test_datasets_take_turns_and_no_question_is_shown_twice():
    base, tuned = points([False] * 5), points([True, True, True, True, False])
    shown = [(each["kind"], each["dataset"], each["number"]) for each in choose_examples(base, tuned)]
    # Both models behave the same at number 4; numbers 1 and 2 repeat the question of number 0.
    per_kind = [("a", 0), ("b", 0), ("a", 3)]
    assert shown == [(kind, *place) for kind in ("call", "text") for place in per_kind]


def test_answers_stand_beside_their_points():
    base, tuned = points([False] * 5), points([True] * 5)
    for each in choose_examples(base, tuned):
        assert (each["base"]["verdicts"], each["tuned"]["verdicts"]) == ({"called": False}, {"called": True})
        assert each["base"]["question"] == each["tuned"]["question"] == each["question"]
