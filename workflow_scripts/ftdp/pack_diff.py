"""Compares two pack plans: which documents are only in one, cut otherwise, packed with others, or moved."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from ftdp.pack_plan import PackPlan, open_plan


class _Placed(NamedTuple):
    """The slices of a plan: int64 arrays (slices,).

    Attributes:
        document: The file's number in the names of both plans, and the sample.
        span: First token, and the token after the last.
        row: The row.
        step: The optimizer step of the first epoch that trains on the row, from 1.
        company: A digest of all slices of the row.
    """

    document: np.ndarray
    span: np.ndarray
    row: np.ndarray
    step: np.ndarray
    company: np.ndarray


def diff_plans(
    a: str | os.PathLike, b: str | os.PathLike, global_batch: int = 1, show: int = 20
) -> dict[str, Any]:
    """Compares two plan folders. A document is known by the name of its `.bin` file and its number in it.

    Args:
        a: The first plan.
        b: The second.
        global_batch: Rows of an optimizer step, on all ranks together.
        show: How many documents to name.

    Returns:
        `same` (the plans are the same), `settings` (what differs, old and new), `files` (`only_a`, `only_b`, `changed`),
        `documents` (counts, see below) and `moved`, a list of the first of them with rows and steps.
        Counts: `only_a`, `only_b`, `both`; of these `cut_otherwise`; of the stretches that both have
        `with_others` in their row, `at_another_step`, and `moved`, which are either.

    Raises:
        UserError: One is no plan.
    """
    plans = open_plan(a), open_plan(b)
    if plans[0].sha256() == plans[1].sha256():
        return {"same": True}
    digests = [{file["name"]: file["bin_sha256"] for file in plan.files} for plan in plans]
    names = sorted(digests[0].keys() | digests[1].keys())
    placed = [_place(plan, names, global_batch) for plan in plans]
    first, second = placed
    ours, theirs = _common(first, second)
    documents = [np.unique(each.document) for each in placed]
    both = np.intersect1d(*documents, assume_unique=True)
    whole = [
        np.isin(each.document, both) & ~np.isin(np.arange(len(each.document)), common)
        for each, common in ((first, ours), (second, theirs))
    ]
    otherwise = np.union1d(first.document[whole[0]], second.document[whole[1]])
    with_others = first.company[ours] != second.company[theirs]
    elsewhere = first.step[ours] != second.step[theirs]
    moved = np.flatnonzero(with_others | elsewhere)
    changed = [n for n in names if n in digests[0] and n in digests[1] and digests[0][n] != digests[1][n]]
    return {
        "same": False,
        "settings": {
            key: [plans[0].settings[key], plans[1].settings[key]]
            for key in plans[0].settings
            if plans[0].settings[key] != plans[1].settings[key]
        },
        "files": {
            "only_a": [name for name in names if name not in digests[1]],
            "only_b": [name for name in names if name not in digests[0]],
            "changed": changed,
        },
        "documents": {
            "only_a": len(documents[0]) - len(both),
            "only_b": len(documents[1]) - len(both),
            "both": len(both),
            "cut_otherwise": len(otherwise),
            "with_others": int(with_others.sum()),
            "at_another_step": int(elsewhere.sum()),
            "moved": len(moved),
        },
        "moved": [
            {
                "file": names[int(first.document[mine]) >> 32],
                "sample": int(first.document[mine]) & 0xFFFFFFFF,
                "rows": [int(first.row[mine]), int(second.row[other])],
                "steps": [int(first.step[mine]), int(second.step[other])],
            }
            for mine, other in zip(ours[moved[:show]], theirs[moved[:show]], strict=True)
        ],
    }


def _place(plan: PackPlan, names: list[str], global_batch: int) -> _Placed:
    numbers = {name: number for number, name in enumerate(names)}
    file = np.array([numbers[entry["name"]] for entry in plan.files], dtype=np.int64)[plan.slices["file"]]
    document = (file << 32) | plan.slices["sample"]
    span = (plan.slices["start"].astype(np.int64) << 32) | plan.slices["stop"]
    row = np.repeat(np.arange(len(plan)), np.diff(plan.rows))
    entry = np.empty(len(plan), dtype=np.int64)
    entry[plan.order(0)] = np.arange(len(plan))
    company = np.add.reduceat(_mix(document) ^ _mix(span + 1), plan.rows[:-1])
    return _Placed(document, span, row, entry[row] // global_batch + 1, company[row])


def _mix(values: np.ndarray) -> np.ndarray:
    """Scatters int64 values over 64 bits (the finaliser of splitmix64)."""
    bits = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def _common(first: _Placed, second: _Placed) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers, in both plans, of the stretches that both have."""
    document = np.concatenate([first.document, second.document])
    span = np.concatenate([first.span, second.span])
    order = np.lexsort((span, document))
    same = (np.diff(document[order]) == 0) & (np.diff(span[order]) == 0)
    return order[:-1][same], order[1:][same] - len(first.document)
