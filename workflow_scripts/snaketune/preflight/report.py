"""Merges the answers of all ranks, and renders them as text."""

from __future__ import annotations

from collections.abc import Sequence

from snaketune.preflight.check import Check
from snaketune.preflight.ranks import check_shared_files


def summarise(nonce: dict, answers: Sequence[dict]) -> list[Check]:
    """Returns the checks in the order in which they ran; ranks with the same result share a line.

    Args:
        nonce: The nonce written before the job.
        answers: Answers of the ranks, with their `checks`.
    """
    names = list(dict.fromkeys(check["name"] for answer in answers for check in answer["checks"]))
    merged = [check_shared_files(nonce, answers)]
    for name in names:
        ranks: dict[Check, list[dict]] = {}
        for answer in answers:
            for check in answer["checks"]:
                if check["name"] == name:
                    ranks.setdefault(Check(**check), []).append(answer)
        # Times of a sum differ slightly between ranks: if all passed, show only the first.
        outcomes = [check for check in ranks if not check.passed] or list(ranks)[:1]
        for check in outcomes:
            where = ", ".join(f"rank {answer['rank']} on {answer['host']}" for answer in ranks[check])
            found = check.found if check.passed or len(answers) == 1 else f"{check.found} ({where})"
            merged.append(Check(name, check.passed, found, check.fix))
    if answers and all(check.name != "all-reduce" for check in merged):
        merged.append(Check("all-reduce", False, "no rank finished it", "see logs/probe_partition.log"))
    return merged


def render(checks: Sequence[Check]) -> str:
    """Returns the report as text: one line per check, with the fix below a failed one."""
    failed = [check for check in checks if not check.passed]
    width = max(len(check.name) for check in checks)
    lines = ["preflight: pass" if not failed else f"preflight: {len(failed)} of {len(checks)} checks failed"]
    for check in checks:
        lines.append(f"  {'pass' if check.passed else 'FAIL'}  {check.name:<{width}}  {check.found}")
        if not check.passed and check.fix:
            lines.append(f"  to do {'':<{width}}  {check.fix}")
    return "\n".join(lines) + "\n"
