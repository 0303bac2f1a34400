"""The answers of all ranks in one list, and the text that people read."""

from __future__ import annotations

from collections.abc import Sequence

from snaketune.preflight.check import Check
from snaketune.preflight.ranks import check_shared_files


def summarise(nonce: dict, answers: Sequence[dict]) -> list[Check]:
    """Returns the checks in the order in which they were made; ranks that found the same share a line.

    Args:
        nonce: What was written before the job.
        answers: Of the ranks, with their `checks`.
    """
    names = list(dict.fromkeys(check["name"] for answer in answers for check in answer["checks"]))
    merged = [check_shared_files(nonce, answers)]
    for name in names:
        ranks: dict[Check, list[dict]] = {}
        for answer in answers:
            for check in answer["checks"]:
                if check["name"] == name:
                    ranks.setdefault(Check(**check), []).append(answer)
        # The time of a sum differs a little from rank to rank: the first one's stands for all that passed.
        outcomes = [check for check in ranks if not check.passed] or list(ranks)[:1]
        for check in outcomes:
            where = ", ".join(f"rank {answer['rank']} on {answer['host']}" for answer in ranks[check])
            found = check.found if check.passed or len(answers) == 1 else f"{check.found} ({where})"
            merged.append(Check(name, check.passed, found, check.fix))
    if answers and all(check.name != "all-reduce" for check in merged):
        merged.append(Check("all-reduce", False, "no rank came back from it", "see logs/probe_partition.log"))
    return merged


def render(checks: Sequence[Check]) -> str:
    """Returns the report as text: one line a check, and below it what to do."""
    failed = [check for check in checks if not check.passed]
    width = max(len(check.name) for check in checks)
    lines = ["preflight: pass" if not failed else f"preflight: {len(failed)} of {len(checks)} checks failed"]
    for check in checks:
        lines.append(f"  {'pass' if check.passed else 'FAIL'}  {check.name:<{width}}  {check.found}")
        if not check.passed and check.fix:
            lines.append(f"  to do {'':<{width}}  {check.fix}")
    return "\n".join(lines) + "\n"
