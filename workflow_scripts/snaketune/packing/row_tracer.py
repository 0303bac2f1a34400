"""Traces a row of a plan to its documents and their lines in the JSONL files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snaketune.common.cli import UserError
from snaketune.packing.pack_plan import PackPlan
from snaketune.tokenized.bin_reader import read_meta
from snaketune.tokenized.layout import dataset_of
from snaketune.tokenized.manifests import Manifests
from snaketune.tokenized.source_lines import source_lines


@dataclass(frozen=True)
class TracedSlice:
    """A slice in a row, with its source.

    Attributes:
        dataset: The dataset's folder.
        source: The JSONL file; None if unknown.
        line: The line in it, from 1; None if unknown.
        bin: The `.bin` file, relative to the train folder.
        sample: The document's number in the `.bin` file, from 0.
        tokens: Tokens in the whole document.
        start: First token of the slice.
        stop: The token after its last.
    """

    dataset: str
    source: str | None
    line: int | None
    bin: str
    sample: int
    tokens: int
    start: int
    stop: int

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as a dict."""
        return dict(vars(self))


class RowTracer:
    """Traces rows of a plan. Reads each JSONL file once, when first needed.

    Args:
        plan: The plan.
        processed_dir: Folder of the JSONL files, if not the one recorded in the plan.

    Attributes:
        notes: Why the lines of a file are unknown, by the file's name in the plan.
    """

    def __init__(self, plan: PackPlan, processed_dir: str | os.PathLike | None = None):
        self.plan = plan
        self.processed_dir = Path(processed_dir) if processed_dir else plan.processed_dir
        self.notes: dict[str, str] = {}
        self._manifests = Manifests()
        self._sources: dict[int, tuple[Path | None, np.ndarray | None]] = {}
        self._lengths: dict[int, np.ndarray] = {}

    def row(self, number: int) -> list[TracedSlice]:
        """Returns the slices of a row, in order."""
        traced = []
        for each in self.plan.row(number):
            name = self.plan.files[each.file]["name"]
            source, lines = self._source(each.file, name)
            traced.append(
                TracedSlice(
                    dataset_of(name),
                    None if source is None else str(source),
                    None if lines is None else int(lines[each.sample]),
                    name,
                    each.sample,
                    int(self._length(each.file, name)[each.sample]),
                    each.start,
                    each.stop,
                )
            )
        return traced

    def _length(self, file: int, name: str) -> np.ndarray:
        if file not in self._lengths:
            self._lengths[file] = read_meta(self.plan.train_folder / name)[:, 1]
        return self._lengths[file]

    def _source(self, file: int, name: str) -> tuple[Path | None, np.ndarray | None]:
        if file not in self._sources:
            self._sources[file] = (None, None)
            try:
                if self.processed_dir is None:
                    raise UserError(
                        "the folder of the JSONL files is unknown", fix="pass it with --processed-dir"
                    )
                entry = self._manifests.of(self.plan.train_folder / name)
                if entry is None:
                    raise UserError(f"{name} is not in any manifest", fix="tokenise the dataset again")
                self._sources[file] = source_lines(entry, self.processed_dir)
            except UserError as error:
                self.notes[name] = str(error)
        return self._sources[file]
