"""What a training cost, from the files that the pages take it from."""

from __future__ import annotations

from pathlib import Path

from snaketune.common.files import read_json


def core_hours(run: Path) -> float:
    """Core-hours of a training of one attempt: its own count or Snakemake's, which misses what ends between two looks.

    Args:
        run: Folder of the run, in its results folder.
    """
    tsv = run.parent / "benchmarks" / "train_model" / f"{run.name}.tsv"
    benchmark = tsv.read_text().splitlines()[1].split("\t")
    (attempts,) = run.glob("checkpoints/*/attempts.json")
    (attempt,) = read_json(attempts)["costs"].values()
    return max(float(benchmark[-1]), attempt["core_seconds"]) / 3600
