"""Statistics of a tokenised dataset for people and the report: lengths, longest documents, shares and counts.

They are computed from the manifest, the meta files, the quarantine and the records of the files, so they can be recreated
at any time. No digest covers them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from snaketune.common.files import read_json, write_json
from snaketune.tokenized.layout import dataset_folder, meta_path, quarantine_path, stats_path
from snaketune.tokenized.tally import LONGEST

UNTRAINED = "truncated_untrained"
_REASONS = 20
_ROWS = 1 << 20
_PERCENTILES = (50, 90, 95, 99)
_COUNTS = ("straddling_messages", "tokens_differing_from_compat", "control_messages")


def write_stats(
    manifest_path: str | os.PathLike,
    manifest: Mapping[str, Any],
    tokenized_dir: str | os.PathLike,
    untrained: int | None,
) -> dict[str, Any]:
    """Writes the stats of a dataset beside its manifest, and returns them. Arguments: see `dataset_stats`."""
    stats = dataset_stats(manifest, tokenized_dir, untrained)
    write_json(stats_path(manifest_path), stats)
    return stats


def untrained_warning(manifest_path: str | os.PathLike) -> str | None:
    """Returns a sentence about the conversations of a dataset that lost all their trained tokens by the cut, if any.

    Stats of earlier releases do not count them.
    """
    stats = stats_path(manifest_path)
    found = read_json(stats) if stats.is_file() else {}
    if not found.get(UNTRAINED):
        return None
    folder = dataset_folder(Path(manifest_path).parent.parent, "train", found["dataset"])
    return (
        f"warning: {folder}: {found[UNTRAINED]:,} of {found['truncated']:,} cut conversations lost all their trained tokens"
        " and teach nothing; raise data.max_tokens (--max-length of tokenize_dataset.py), or remove them from the data"
    )


def dataset_stats(
    manifest: Mapping[str, Any], tokenized_dir: str | os.PathLike, untrained: int | None
) -> dict[str, Any]:
    """Returns the stats of a tokenised dataset.

    Args:
        manifest: The dataset's manifest.
        tokenized_dir: Folder that the manifest's paths are relative to.
        untrained: Conversations that lost all their trained tokens by the cut; None if unknown.

    Returns:
        JSON values: counts of documents and tokens, `lengths` in tokens (mean, percentiles, shortest,
        longest), the longest documents with their source lines and their numbers for `inspect_sample.py`,
        counts of bad lines by reason, and the sums of each file.
    """
    root, totals = Path(tokenized_dir), manifest["totals"]
    by_length = np.zeros(1, dtype=np.int64)
    longest: list[dict[str, Any]] = []
    for file in manifest["files"]:
        places = {key: file[key] for key in ("source", "bin")}
        longest += [{**places, **sample} for sample in file["longest_samples"]]
        for lengths in _lengths(meta_path(root / file["bin"])):
            counts = np.bincount(lengths)
            by_length, counts = sorted((by_length, counts), key=len, reverse=True)
            by_length = by_length.copy()
            by_length[: len(counts)] += counts
    longest.sort(key=lambda each: (-each["tokens"], each["bin"], each["sample"]))
    counts = manifest.get("counts", {})
    return {
        "format": 1,
        "dataset": manifest["dataset"],
        **{
            key: totals[key]
            for key in ("samples", "heldout", "valid_samples", "tokens", "trained_tokens", "truncated")
        },
        UNTRAINED: untrained,
        "quarantined": totals.get("quarantined", 0),
        "trained_share": manifest["trained_share"],
        **{key: counts.get(key, 0) for key in _COUNTS},
        "lengths": _summary(by_length),
        "length_histogram": manifest["length_histogram"],
        "longest_samples": longest[:LONGEST],
        "bad_lines": _reasons(root, manifest),
        "files": [_file(file, manifest["dataset"]) for file in manifest["files"]],
    }


def _lengths(meta: Path) -> Iterator[np.ndarray]:
    """Yields the lengths of consecutive documents in tokens, as int64 arrays."""
    rows = np.load(meta, mmap_mode="r")
    for first in range(0, len(rows), _ROWS):
        yield np.array(rows[first : first + _ROWS, 1])


def _summary(by_length: np.ndarray) -> dict[str, Any]:
    """Summarises lengths. `by_length[n]` is the number of documents of n tokens. p% are no longer than percentile p."""
    total = int(by_length.sum())
    if not total:
        return {"mean": None, **{f"p{p}": None for p in _PERCENTILES}, "shortest": None, "longest": None}
    cumulated = np.cumsum(by_length)
    used = np.flatnonzero(by_length)
    mean = float((by_length * np.arange(len(by_length))).sum() / total)
    percentiles = {f"p{p}": int(np.searchsorted(cumulated, -(-p * total // 100))) for p in _PERCENTILES}
    return {"mean": round(mean, 2), **percentiles, "shortest": int(used[0]), "longest": int(used[-1])}


def _reasons(root: Path, manifest: Mapping[str, Any]) -> dict[str, int]:
    """Counts the bad lines by reason, most common first."""
    reasons: Counter[str] = Counter()
    for file in manifest["files"]:
        path = quarantine_path(root, manifest["dataset"], file["bin"])
        if path.exists():
            with open(path, "rb") as lines:
                reasons.update(_kind(orjson.loads(line)["reason"]) for line in lines)
    return dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))[:_REASONS])


def _kind(reason: str) -> str:
    """Returns the reason without the found value and the message number."""
    return re.sub(r"\[\d+\]", "[n]", reason.split("; found: ", 1)[0])


def _file(file: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    keys = ("source", "bin", "samples", "heldout", "tokens", "trained_tokens", "truncated", "longest")
    share = file["trained_tokens"] / file["tokens"] if file["tokens"] else 0.0
    return {
        **{key: file[key] for key in keys},
        "quarantined": file.get("quarantined", 0),
        "quarantine": quarantine_path("", dataset, file["bin"]).as_posix()
        if file.get("quarantined")
        else None,
        "trained_share": share,
    }
