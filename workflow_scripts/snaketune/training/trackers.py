"""Experiment trackers, which receive each step's metrics if a config names them.

Users install the packages of trackers. TensorBoard files are always written. A tracker is an object with
`log(step, values)` and `close()`, on rank 0.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from snaketune.common.cli import UserError
from snaketune.common.files import read_json, write_text
from snaketune.common.result_paths import IDENTITY

PROJECT = "snaketune"


def check_loggers(names: Sequence[str]) -> None:
    """Checks that the trackers named in a config are available.

    Raises:
        UserError: One is unknown, or its package is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise UserError("invalid loggers", found=name, expected=" or ".join(LOGGERS))
        if find_spec(name) is None:
            raise UserError(
                f"loggers includes {name}, which is not installed here",
                fix=f"run pip install {name}, or remove it from train.loggers",
            )


class WandbLogger:
    """Weights & Biases: one W&B run per run folder, which a resumed training continues.

    `WANDB_MODE=offline` stores everything in the run folder, for a later `wandb sync`.
    """

    def __init__(self, folder: Path, hyperparameters: Mapping):
        import wandb

        run_id, name = _run_id(folder), os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(
            project=name,
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=folder,
            config=dict(hyperparameters),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class MlflowLogger:
    """MLflow: one MLflow run per run folder, at `MLFLOW_TRACKING_URI` or in `mlflow.db` in the run folder."""

    def __init__(self, folder: Path, hyperparameters: Mapping):
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        file = folder / "mlflow_run"
        if file.is_file():
            self._run = file.read_text().strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        write_text(file, self._run + "\n")
        for key, value in hyperparameters.items():
            self._client.log_param(self._run, key, str(value)[:500])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values of a step."""
        for key, value in values.items():
            self._client.log_metric(self._run, key, value, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run)


LOGGERS = {"wandb": WandbLogger, "mlflow": MlflowLogger}


def start_loggers(names: Sequence[str], folder: Path) -> list:
    """Returns the trackers of a run. Reads its hyperparameters from identity.json in the run folder."""
    if not names:
        return []
    hyperparameters = read_json(folder / IDENTITY)["fields"]["hyperparameters"]
    return [LOGGERS[name](folder, hyperparameters) for name in names]


def _run_id(folder: Path) -> str:
    return read_json(folder / IDENTITY)["identity"][:16]
