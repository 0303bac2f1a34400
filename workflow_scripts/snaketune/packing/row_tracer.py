"""Which documents stand in a row of a plan, down to the lines of the JSONL files."""

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
    """A stretch of a document in a row.

    Attributes:
        dataset: The dataset's folder.
        source: The JSONL file; None if it is not known.
        line: Its line, from 1; None if it is not known.
        bin: The tokenised file, relative to the train folder.
        sample: The document's number in it, from 0.
        tokens: Tokens of the whole document.
        start: First token of the stretch.
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
        """Returns the fields."""
        return dict(vars(self))


class RowTracer:
    """Traces rows of a plan; each JSONL file is read once, when it is first needed.

    Args:
        plan: The plan.
        processed_dir: The folder of the JSONL files, if not the one that the plan names.

    Attributes:
        notes: Why lines of a file are not known, by its name in the plan.
    """

    def __init__(self, plan: PackPlan, processed_dir: str | os.PathLike | None = None):
        self.plan = plan
        self.processed_dir = Path(processed_dir) if processed_dir else plan.processed_dir
        self.notes: dict[str, str] = {}
        self._manifests = Manifests()
        self._sources: dict[int, tuple[Path | None, np.ndarray | None]] = {}
        self._lengths: dict[int, np.ndarray] = {}

    def row(self, number: int) -> list[TracedSlice]:
        """Returns the stretches of a row, in their order."""
        traced = []
        for piece in self.plan.row(number):
            name = self.plan.files[piece.file]["name"]
            source, lines = self._source(piece.file, name)
            traced.append(
                TracedSlice(
                    dataset_of(name),
                    None if source is None else str(source),
                    None if lines is None else int(lines[piece.sample]),
                    name,
                    piece.sample,
                    int(self._length(piece.file, name)[piece.sample]),
                    piece.start,
                    piece.stop,
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
                        "the folder of the JSONL files is not known", fix="give it with --processed-dir"
                    )
                entry = self._manifests.of(self.plan.train_folder / name)
                if entry is None:
                    raise UserError(f"{name} is in no manifest", fix="tokenise the dataset again")
                self._sources[file] = source_lines(entry, self.processed_dir)
            except UserError as error:
                self.notes[name] = str(error)
        return self._sources[file]
