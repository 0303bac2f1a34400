"""The parts of pack plans that the workflow itself needs. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from snaketune.common.cli import UserError

# Increase when the same settings and data no longer give the same plan.
PLAN_FORMAT = 1
PLAN_ARRAYS = ("rows.npy", "slices.npy", "order.npy")


def own_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    """Returns the weights other than 1, so that equal mixtures are equal mappings."""
    return {name: float(weight) for name, weight in sorted((weights or {}).items()) if weight != 1}


def check_weights(weights: Mapping[str, float] | None, datasets: Collection[str], mode: str) -> None:
    """Checks the dataset weights: how often the documents of each dataset are seen per epoch.

    Args:
        weights: Weights by dataset name. Datasets that are not listed have weight 1.
        datasets: Names of all datasets.
        mode: Packing mode.

    Raises:
        UserError: A dataset does not exist, a weight is invalid, or all weights are 0.
    """
    for name, weight in (weights or {}).items():
        if name not in datasets:
            raise UserError(
                f"packing.weights names an unknown dataset: {name}",
                found=", ".join(sorted(datasets)),
                fix="correct packing.weights, or data.datasets",
            )
        if not 0 <= weight <= 1000:
            raise UserError(f"invalid weight of {name}", found=weight, expected="a number from 0 to 1000")
        if mode == "xtuner" and weight not in (0, 1):
            raise UserError(
                f"packing.mode xtuner does not support weight {weight:g} for {name}",
                expected="0 or 1: XTuner uses a file once or not at all",
                fix="set packing.mode: best_fit",
            )
    if datasets and all((weights or {}).get(name, 1) == 0 for name in datasets):
        raise UserError(
            "every dataset has weight 0", fix="give at least one a weight above 0 in packing.weights"
        )
