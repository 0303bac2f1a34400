"""The pack plan: which slices of which documents make each packed sequence (row), and the order of the rows.

A plan is a folder. plan_packing.py writes it once; the trainer only reads it:

    plan.json    settings, `.bin` files with digests, counts (packed, cut, left out); written last
    rows.npy     int64 (rows + 1,): row r consists of slices rows[r] to rows[r + 1] - 1
    slices.npy   one record per slice, see SLICE
    order.npy    int32 (epochs, rows): for each epoch, the rows in training order

The arrays are memory-mapped, so opening a plan takes the same time whatever its size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snaketune.common.cli import UserError
from snaketune.common.files import atomic_path, read_json, sha256_json, write_json
from snaketune.packing.plan_format import PLAN_ARRAYS, PLAN_FORMAT

MODES = ("best_fit", "single", "xtuner")
SEED = 1024  # XTuner's
PLAN = "plan.json"

# A slice of a document: the index of its file in the plan, its number in that file, its tokens from `start`
# up to but not including `stop`, and the byte offset and byte length of its line.
SLICE = np.dtype(
    [
        ("file", "<i4"),
        ("sample", "<i4"),
        ("start", "<i4"),
        ("stop", "<i4"),
        ("offset", "<i8"),
        ("bytes", "<i8"),
    ]
)


class Slice(NamedTuple):
    """One record of slices.npy."""

    file: int
    sample: int
    start: int
    stop: int
    offset: int
    bytes: int


@dataclass
class PackPlan:
    """A plan, in memory or mapped from its folder.

    Attributes:
        mode: best_fit, single or xtuner.
        seed: Seed of the packing and of the row order.
        max_length: Tokens of a full row.
        train_folder: Folder that file names are relative to.
        files: One entry per file: `name`, `samples`, `tokens`, `bin_bytes`, `bin_sha256` (None if not
            requested).
        rows: int64 (rows + 1,), see above.
        slices: SLICE array.
        orders: int32 (epochs, rows); later epochs are computed on demand.
        totals: Counts: `documents`, `tokens`, `rows`, `waste`, `cut` and `dropped`, see docs/packing.md.
        processed_dir: Folder of the JSONL files, if given; used only for traces.
        made_with: Tokenizer, template and options of the files, see snaketune/tokenized/compatibility.py;
            None if unknown.
        weights: How often the documents of a dataset are seen per epoch, where that is not once.
    """

    mode: str
    seed: int
    max_length: int
    train_folder: Path
    files: list[dict[str, Any]]
    rows: np.ndarray
    slices: np.ndarray
    orders: np.ndarray
    totals: dict[str, Any] = field(default_factory=dict)
    processed_dir: Path | None = None
    made_with: dict[str, Any] | None = None
    weights: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        """Returns the number of rows in an epoch."""
        return len(self.rows) - 1

    @property
    def slice_lengths(self) -> np.ndarray:
        """Tokens of each slice: an int array (slices,)."""
        return self.slices["stop"] - self.slices["start"]

    def row(self, number: int) -> list[Slice]:
        """Returns the slices of a row, in order."""
        return [Slice(*record) for record in self.slices[self.rows[number] : self.rows[number + 1]].tolist()]

    def order(self, epoch: int) -> np.ndarray:
        """Returns the rows of an epoch in training order: int array (rows,)."""
        return self.orders[epoch] if epoch < len(self.orders) else shuffled_rows(len(self), self.seed, epoch)

    def entries_per_epoch(self, world_size: int) -> int:
        """Returns how many rows of an epoch are trained on.

        All of them, but in mode xtuner the largest multiple of `world_size`, as in XTuner.
        """
        return len(self) // world_size * world_size if self.mode == "xtuner" else len(self)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the plan was made with."""
        own = {"weights": self.weights} if self.weights else {}
        return {"mode": self.mode, "seed": self.seed, "max_length": self.max_length, **own}

    def sha256(self) -> str:
        """Returns the digest of everything that decides the training data and their order. Excludes paths."""
        digests = {name: hashlib.sha256(getattr(self, name)).hexdigest() for name in ("rows", "slices")}
        data = [[file["name"], file["bin_sha256"]] for file in self.files]
        return sha256_json({"format": PLAN_FORMAT, **self.settings, "files": data, **digests})

    def write(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Writes the plan folder, plan.json last, and returns the content of plan.json."""
        folder = Path(folder)
        (folder / PLAN).unlink(missing_ok=True)
        for name, array in zip(PLAN_ARRAYS, (self.rows, self.slices, self.orders), strict=True):
            with atomic_path(folder / name) as path, open(path, "wb") as file:
                np.save(file, array, allow_pickle=False)
        manifest = {
            "format": PLAN_FORMAT,
            "plan_sha256": self.sha256(),
            **self.settings,
            "train_folder": os.path.relpath(self.train_folder, folder),
            "processed_dir": self.processed_dir and os.path.relpath(self.processed_dir, folder),
            "made_with": self.made_with,
            "files": self.files,
            "rows": len(self),
            "slices": len(self.slices),
            "epochs": len(self.orders),
            "totals": self.totals,
        }
        write_json(folder / PLAN, manifest)
        return manifest


def shuffled_rows(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the row order of an epoch, as in XTuner: int32 (rows,). NumPy keeps RandomState's stream stable."""
    order = np.arange(rows, dtype=np.int32)
    np.random.RandomState(seed + epoch).shuffle(order)
    return order


def read_plan_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the content of plan.json, given a plan folder or the path of its plan.json.

    Raises:
        UserError: The file is missing or is not a pack plan.
    """
    path = plan_folder(folder) / PLAN
    try:
        manifest = read_json(path)
        if manifest["format"] != PLAN_FORMAT or manifest["mode"] not in MODES:
            raise ValueError(f"format {manifest['format']}, mode {manifest['mode']}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing", fix="make the plan with plan_packing.py") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a pack plan", found=error, fix="make it again with plan_packing.py"
        ) from None
    return manifest


def plan_folder(path: str | os.PathLike) -> Path:
    """Returns the plan folder, given the folder or its plan.json."""
    path = Path(path)
    return path.parent if path.name == PLAN else path


def open_plan(folder: str | os.PathLike, train_folder: str | os.PathLike | None = None) -> PackPlan:
    """Opens a plan folder. Maps the arrays, and checks the sizes of the `.bin` files without reading them.

    Args:
        folder: The plan folder.
        train_folder: Folder of the `.bin` files, if not the one recorded in the plan.

    Raises:
        UserError: The plan is incomplete, or a `.bin` file is missing or has changed its size.
    """
    folder = plan_folder(folder)
    manifest = read_plan_manifest(folder)
    arrays = [_map_array(folder / name) for name in PLAN_ARRAYS]
    found = [array.shape for array in arrays]
    expected = [(manifest["rows"] + 1,), (manifest["slices"],), (manifest["epochs"], manifest["rows"])]
    if found != expected or arrays[1].dtype != SLICE:
        raise UserError(
            f"{folder}: the arrays do not match plan.json",
            found=found,
            expected=expected,
            fix="make the plan again with plan_packing.py",
        )
    processed = manifest["processed_dir"]
    plan = PackPlan(
        manifest["mode"],
        manifest["seed"],
        manifest["max_length"],
        Path(train_folder or os.path.normpath(folder / manifest["train_folder"])),
        manifest["files"],
        *arrays,
        totals=manifest["totals"],
        processed_dir=processed and Path(os.path.normpath(folder / processed)),
        weights=manifest.get("weights", {}),
    )
    for file in plan.files:
        _look_up(plan.train_folder / file["name"], file["bin_bytes"])
    return plan


def _map_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read", found=error, fix="make the plan again with plan_packing.py"
        ) from None


def _look_up(path: Path, size: int) -> None:
    try:
        found: Any = path.stat().st_size
    except OSError as error:
        found = error.strerror
    if found != size:
        raise UserError(
            f"{path} is not the file that the pack plan was made from",
            found=found if isinstance(found, str) else f"{found} bytes",
            expected=f"{size} bytes",
            fix="make the plan again with plan_packing.py",
        )


def join_rows(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the `rows` array, given the number of slices in each row."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
