"""Compares two pack plans: documents only in one, cut differently, packed with other documents, or moved."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from snaketune.packing.mixture import scatter
from snaketune.packing.pack_plan import PackPlan, open_plan


class _Placed(NamedTuple):
    """The slices of a plan: int64 arrays (slices,).

    Attributes:
        document: Index of the file in the names of both plans (high 32 bits), number in it (low 32 bits).
        span: First token (high 32 bits) and the token after the last (low 32 bits).
        copy: Which of several equal slices this is, from 0. With weights, a plan may repeat a document.
        row: The row.
        step: The optimizer step that trains on the row in epoch 0, from 1.
        company: A digest of all slices in the row.
    """

    document: np.ndarray
    span: np.ndarray
    copy: np.ndarray
    row: np.ndarray
    step: np.ndarray
    company: np.ndarray


def diff_plans(
    a: str | os.PathLike, b: str | os.PathLike, global_batch: int = 1, show: int = 20
) -> dict[str, Any]:
    """Compares two plan folders. The name of its `.bin` file and its number in the file identify a document.

    Args:
        a: The first plan.
        b: The second plan.
        global_batch: Rows per optimizer step, over all ranks.
        show: How many moved documents to list.

    Returns:
        `same` (True if the plans are equal), `settings` (those that differ, old and new), `files` (`only_a`,
        `only_b`, `changed`), `documents` (counts, see below) and `moved`, the first moved documents with
        their rows and steps.
        Counts of documents: `only_a`, `only_b`, `both`, and among `both`
        `cut_otherwise` and `more_or_less_often`. Counts of slices that both plans have: `with_others` (other
        slices in the row), `at_another_step`, and `moved` (either of the two).

    Raises:
        UserError: A folder is not a pack plan.
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
    alone = [
        np.isin(each.document, both) & ~np.isin(np.arange(len(each.document)), common)
        for each, common in ((first, ours), (second, theirs))
    ]
    # Where both plans cut a document the same way, copy 0 of each slice always has a match.
    otherwise = np.unique(
        np.concatenate(
            [each.document[one & (each.copy == 0)] for each, one in zip(placed, alone, strict=True)]
        )
    )
    often = [_times(each, both) for each in placed]
    with_others = first.company[ours] != second.company[theirs]
    elsewhere = first.step[ours] != second.step[theirs]
    moved = np.flatnonzero(with_others | elsewhere)
    changed = [n for n in names if n in digests[0] and n in digests[1] and digests[0][n] != digests[1][n]]
    return {
        "same": False,
        "settings": {
            key: [plan.settings.get(key) for plan in plans]
            for key in plans[0].settings | plans[1].settings
            if plans[0].settings.get(key) != plans[1].settings.get(key)
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
            "more_or_less_often": int((often[0] != often[1]).sum()),
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
    company = np.add.reduceat(scatter(document) ^ scatter(span + 1), plan.rows[:-1])
    step = entry[row] // global_batch + 1
    return _Placed(document, span, _copy_numbers(document, span), row, step, company[row])


def _copy_numbers(document: np.ndarray, span: np.ndarray) -> np.ndarray:
    order = np.lexsort((span, document))  # stable: copies stay in row order
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(document[order]) != 0) | (np.diff(span[order]) != 0)
    begins = np.flatnonzero(new)
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
    return numbers


def _times(placed: _Placed, documents: np.ndarray) -> np.ndarray:
    """Returns how often each document is in a plan. Exactly one slice of each copy holds the first token."""
    begins = placed.document[placed.span >> 32 == 0]
    begins = begins[np.isin(begins, documents)]
    return np.bincount(np.searchsorted(documents, begins), minlength=len(documents))


def _common(first: _Placed, second: _Placed) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the slices that both plans have, in the first plan and in the second."""
    document, span, copy = (np.concatenate(pair) for pair in list(zip(first, second, strict=True))[:3])
    order = np.lexsort((copy, span, document))
    same = (np.diff(document[order]) == 0) & (np.diff(span[order]) == 0) & (np.diff(copy[order]) == 0)
    return order[:-1][same], order[1:][same] - len(first.document)
