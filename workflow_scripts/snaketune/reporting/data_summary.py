"""Data section of the report. Every number comes from the datasets' manifests and stats.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from snaketune.common.cli import UserError
from snaketune.common.files import read_json
from snaketune.tokenized.layout import dataset_folder, stats_path
from snaketune.tokenized.manifests import read_manifest
from snaketune.tokenized.stats import LONGEST, UNTRAINED

# A run may have thousands of datasets, too many for a histogram each.
_HISTOGRAMS = 8
_PLACES = 20
_SUMMED = ("samples", "heldout", "quarantined", "tokens", "trained_tokens", "truncated")
_COUNTED = ("straddling_messages", "tokens_differing_from_compat", "control_messages")


class Dataset(NamedTuple):
    """A tokenised dataset.

    Attributes:
        manifest: Its manifest.
        stats: Its stats.json.
        folder: The tokenised folder; paths in both are relative to it.
    """

    manifest: Mapping[str, Any]
    stats: Mapping[str, Any]
    folder: str


def load_dataset(manifest: Path) -> Dataset:
    """Reads a dataset's manifest and stats.

    Raises:
        UserError: The file is not a manifest, or there are no stats.
    """
    stats = stats_path(manifest)
    if not stats.is_file():
        raise UserError(
            f"{stats} is missing", expected="the stats of the dataset", fix="tokenise the dataset again"
        )
    return Dataset(read_manifest(manifest), read_json(stats), str(manifest.parent.parent))


def data_summary(datasets: list[Dataset]) -> dict[str, Any]:
    """Returns the template's variables.

    Returns:
        rows: One mapping for all datasets, with `name` None, and one per dataset.
        histograms: (name, length histogram) of all datasets together and, if there are several, of the
            largest.
        longest: Mappings with `dataset`, `source`, `line`, `bin`, `sample` and `tokens`, longest first.
        reasons: (reason, number) of bad lines, most common first.
        quarantine_files: A list of (path, bad lines), and the number of files left out.
        untrained: A list of (folder, conversations that lost all their trained tokens by the cut), most first, and the
            number of folders left out.
    """
    rows = [_row(dataset) for dataset in sorted(datasets, key=lambda dataset: dataset.stats["dataset"])]
    reasons: Counter[str] = Counter()
    for dataset in datasets:
        reasons.update(dataset.stats["bad_lines"])
    files = [
        (f"{dataset.folder}/{file['quarantine']}", file["quarantined"])
        for dataset in datasets
        for file in dataset.stats["files"]
        if file["quarantined"]
    ]
    # Stats of earlier releases do not have this number.
    untrained = sorted(
        (
            (str(dataset_folder(dataset.folder, "train", dataset.stats["dataset"])), number)
            for dataset in datasets
            if (number := dataset.stats.get(UNTRAINED))
        ),
        key=lambda pair: (-pair[1], pair[0]),
    )
    return {
        "rows": [_total(rows), *rows],
        "histograms": _histograms(datasets),
        "longest": _longest(datasets),
        "reasons": sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0])),
        "quarantine_files": (sorted(files)[:_PLACES], max(0, len(files) - _PLACES)),
        "untrained": (untrained[:_PLACES], max(0, len(untrained) - _PLACES)),
    }


def _row(dataset: Dataset) -> dict[str, Any]:
    manifest, stats = dataset.manifest, dataset.stats
    options = manifest["options"]
    return {
        "name": stats["dataset"],
        **{key: stats[key] for key in (*_SUMMED, *_COUNTED, "trained_share")},
        # Copies in the valid folder are also in train, and count there.
        "valid": stats["valid_samples"] if options["valid"] == "holdout" else 0,
        "median": stats["lengths"]["p50"],
        "longest": stats["lengths"]["longest"],
        "mask": options["mask"],
        "control_tokens": options["control_tokens"],
    }


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {"name": None, "median": None}
    for key in (*_SUMMED, *_COUNTED, "valid"):
        total[key] = sum(row[key] for row in rows)
    total["longest"] = max((row["longest"] or 0 for row in rows), default=0)
    total["trained_share"] = total["trained_tokens"] / total["tokens"] if total["tokens"] else 0.0
    for key in ("mask", "control_tokens"):
        values = {row[key] for row in rows}
        total[key] = values.pop() if len(values) == 1 else "several"
    return total


def _histograms(datasets: list[Dataset]) -> list[tuple[str, dict[str, list[int]]]]:
    each = [(dataset.stats["dataset"], dataset.stats["length_histogram"]) for dataset in datasets]
    if len(each) < 2:
        return each
    edges = max((histogram["edges"] for _, histogram in each), key=len)
    counts = [0] * (len(edges) - 1)
    for _, histogram in each:
        for place, count in enumerate(histogram["counts"]):
            counts[place] += count
    largest = sorted(datasets, key=lambda dataset: -dataset.stats["tokens"])[:_HISTOGRAMS]
    names = {dataset.stats["dataset"] for dataset in largest}
    return [("all", {"edges": edges, "counts": counts}), *(pair for pair in each if pair[0] in names)]


def _longest(datasets: list[Dataset]) -> list[dict[str, Any]]:
    samples = [
        {"dataset": dataset.stats["dataset"], **sample, "bin": f"{dataset.folder}/{sample['bin']}"}
        for dataset in datasets
        for sample in dataset.stats["longest_samples"]
    ]
    return sorted(samples, key=lambda each: (-each["tokens"], each["dataset"], each["bin"], each["sample"]))[
        :LONGEST
    ]
