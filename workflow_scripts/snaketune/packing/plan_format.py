"""What the workflow knows of pack plans. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from snaketune.common.cli import UserError

# Bumped when the same settings and data give another plan.
PLAN_FORMAT = 1
PLAN_ARRAYS = ("rows.npy", "slices.npy", "order.npy")


def own_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    """Returns the weights of datasets that are not 1, so that equal mixtures are equal mappings."""
    return {name: float(weight) for name, weight in sorted((weights or {}).items()) if weight != 1}


def check_weights(weights: Mapping[str, float] | None, datasets: Collection[str], mode: str) -> None:
    """Checks how often the documents of each dataset are to be seen an epoch.

    Args:
        weights: Weight by name of the dataset; 1 for those not named.
        datasets: Names of all datasets.
        mode: Of the packing.

    Raises:
        UserError: A dataset does not exist, a weight cannot be used, or nothing would be left to train on.
    """
    for name, weight in (weights or {}).items():
        if name not in datasets:
            raise UserError(
                f"a weight is given to a dataset that is not there: {name}",
                found=", ".join(sorted(datasets)),
                fix="correct packing.weights, or data.datasets",
            )
        if not 0 <= weight <= 1000:
            raise UserError(
                f"the weight of {name} cannot be used", found=weight, expected="a number from 0 to 1000"
            )
        if mode == "xtuner" and weight not in (0, 1):
            raise UserError(
                f"packing.mode xtuner cannot give {name} the weight {weight:g}",
                expected="0 or 1: XTuner takes a file once or not at all",
                fix="set packing.mode: best_fit",
            )
    if datasets and all((weights or {}).get(name, 1) == 0 for name in datasets):
        raise UserError("every dataset has the weight 0", fix="give one of them a weight in packing.weights")
