"""Finds and reads the files of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from snaketune.common import result_paths as names
from snaketune.common.cli import UserError
from snaketune.common.files import read_json


class RunFiles:
    """Finds and reads the files of a run. Each file is read once, on first use.

    Files are named as in `result_paths`, with the words in braces filled in by keyword:
    `run.read(names.EVALUATION, label="tuned")`. Files with several callers have a property.

    Attributes:
        folder: The run's folder, `<results>/<run>`.
        name: The run's name.
    """

    def __init__(self, folder: Path, name: str | None = None, given: Mapping[str, Path | None] | None = None):
        """Reads nothing.

        Args:
            folder: The run's folder.
            name: The run's name; the folder's name by default.
            given: Path of each file by name (words in braces filled in), for scripts that receive every path
                as an argument. The run then has only these files; None marks one that it does not have.
                Without `given`, all files are in `folder`.
        """
        self.folder, self.name = folder, name or folder.absolute().name
        self._given = given
        self._contents: dict[Path, Any] = {}

    def path(self, name: str, **fields: str) -> Path:
        """Returns the path of a file or folder, which may not exist.

        Raises:
            UserError: Paths were given, but not this one.
        """
        relative = name.format(**fields)
        if self._given is None:
            return self.folder / relative
        path = self._given.get(relative)
        if path is None:
            raise UserError(f"the path of {relative} of run {self.name} was not given")
        return path

    def has(self, name: str, **fields: str) -> bool:
        """True if the run has this file: its path was given, or it is in the run's folder."""
        relative = name.format(**fields)
        return (self.folder / relative).exists() if self._given is None else bool(self._given.get(relative))

    def read(self, name: str, **fields: str) -> Any:
        """Returns the content of a JSON file.

        Raises:
            UserError: The file is missing.
        """
        path = self.path(name, **fields)
        if path not in self._contents:
            if not path.is_file():
                raise UserError(
                    f"{path} is missing", expected="a finished run", fix="run `snakemake` for it first"
                )
            self._contents[path] = read_json(path)
        return self._contents[path]

    def find(self, name: str, **fields: str) -> Any:
        """Like `read`, but returns None for a file that the run does not have."""
        return self.read(name, **fields) if self.has(name, **fields) else None

    @property
    def config(self) -> dict[str, Any]:
        """The run's merged settings, by section (`config.json`)."""
        return self.read(names.CONFIG)

    @property
    def train(self) -> dict[str, Any]:
        """Manifest of the training (`train.json`)."""
        return self.read(names.TRAIN)

    @property
    def hf(self) -> dict[str, Any] | None:
        """Manifest of the Hugging Face folder (`hf/manifest.json`), or None."""
        return self.find(f"{names.HF}/{names.MANIFEST}")

    @property
    def turbomind(self) -> dict[str, Any] | None:
        """Manifest of the TurboMind folder (`turbomind/manifest.json`), or None."""
        return self.find(f"{names.TURBOMIND}/{names.MANIFEST}")

    @property
    def run_folder(self) -> Path:
        """The folder that `train.json` names: the training's metrics and checkpoints."""
        return self.path(names.TRAIN).parent / self.train["run_folder"]

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that `train.json` names: the training's last."""
        return self.path(names.TRAIN).parent / self.train["checkpoint"]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Records of `metrics.jsonl` in the run folder, one per optimizer step; see `read_records`."""
        return read_records(self._metrics)

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        """Records of `evals.jsonl`: the held-out losses during training, if any."""
        path = self._metrics.with_name(names.EVALS)
        return read_records(path) if path.is_file() else []

    @cached_property
    def attempts(self) -> dict[str, Any]:
        """`attempts.json`: the number of `attempts` and their costs; one attempt if the file is missing."""
        path = self._metrics.with_name(names.ATTEMPTS)
        return read_json(path) if path.is_file() else {"attempts": 1}

    @property
    def _metrics(self) -> Path:
        given = self._given and self._given.get(names.METRICS)
        return given or self.run_folder / names.METRICS


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads a JSONL file that training writes. Skips a last line that a killed writer left incomplete.

    Raises:
        UserError: The file is missing, or any other line is invalid.
    """
    if not path.is_file():
        raise UserError(f"no metrics at {path}", fix="pass the file with --metrics")
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: invalid JSON", found=error) from None
    return records


def newest_run_folder(path: Path) -> Path | None:
    """Returns the run folder with the newest identity file, or None if there is none.

    Args:
        path: A run folder, or a run's folder, whose `checkpoints` holds run folders.
    """
    found = [path, *path.glob(names.RUN_FOLDER.format(identity="*"))]
    return max(
        (folder for folder in found if (folder / names.IDENTITY).is_file()),
        key=lambda folder: (folder / names.IDENTITY).stat().st_mtime,
        default=None,
    )
