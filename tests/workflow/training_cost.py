"""The cost of a training, from the files that the pages use."""

from __future__ import annotations

from pathlib import Path

from snaketune.common.files import read_json


def core_hours(run: Path) -> float:
    """Returns the core-hours of a training of one attempt, by its own count or Snakemake's.

    Snakemake's count misses processes that end between two samples, so the larger of the two is used.

    Args:
        run: Folder of the run, in its results folder.
    """
    tsv = run.parent / "benchmarks" / "train_model" / f"{run.name}.tsv"
    benchmark = tsv.read_text().splitlines()[1].split("\t")
    (attempts,) = run.glob("checkpoints/*/attempts.json")
    (attempt,) = read_json(attempts)["costs"].values()
    return max(float(benchmark[-1]), attempt["core_seconds"]) / 3600
