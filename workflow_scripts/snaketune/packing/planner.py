"""Makes pack plans from the `.bin.meta` files alone.

* `xtuner` reproduces the packing of XTuner 0.2.0's `JsonlDataset` and `PackedDataset` without using its code.
  It packs each file separately: it shuffles the documents, concatenates them, cuts every `max_length` tokens,
  and drops the rest at the end of the file.
* `best_fit` packs the documents of all files together (snaketune/packing/best_fit.py). It cuts only documents
  longer than a row, and drops none.
* `single` gives each document a row of its own, for models that cannot keep documents apart. It cuts as best_fit
  does.

With weights, documents of a dataset are seen more or less often per epoch (snaketune/packing/mixture.py).
Each copy is packed like a separate document.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snaketune.common.cli import UserError
from snaketune.packing.best_fit import assign_rows
from snaketune.packing.mixture import copies_per_epoch
from snaketune.packing.pack_plan import MODES, SLICE, PackPlan, join_rows, open_plan, shuffled_rows
from snaketune.packing.plan_format import check_weights, own_weights
from snaketune.settings.schema import default_of
from snaketune.tokenized.bin_reader import read_meta
from snaketune.tokenized.data_order import list_train_files, read_data_order
from snaketune.tokenized.layout import dataset_of


class Documents(NamedTuple):
    """The documents of all files, in file order: int64 arrays (documents,).

    Attributes:
        file: Index of the file.
        sample: Number of the document in its file.
        length: Length in tokens.
        offset: Byte offset of its line.
        bytes: Byte length of its line.
    """

    file: np.ndarray
    sample: np.ndarray
    length: np.ndarray
    offset: np.ndarray
    bytes: np.ndarray

    def chosen(self, which: np.ndarray) -> Documents:
        """Returns the documents that an index or bool array selects."""
        return Documents(*(column[which] for column in self))


class Slices(NamedTuple):
    """Slices of documents, row by row.

    Attributes:
        document: int64 (slices,), index of the document.
        start: int64 (slices,), first token.
        stop: int64 (slices,), the token after the last.
        rows: int64 (rows + 1,); row r consists of slices rows[r] to rows[r + 1] - 1.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    rows: np.ndarray


def make_plan(
    train_folder: str | os.PathLike,
    names: Sequence[str],
    max_length: int,
    mode: str = default_of("packing.mode"),
    seed: int = default_of("packing.seed"),
    epochs: int = 1,
    min_length: int = 0,
    bin_sha256: Sequence[str] | None = None,
    processed_dir: str | os.PathLike | None = None,
    made_with: dict | None = None,
    weights: Mapping[str, float] | None = None,
) -> PackPlan:
    """Makes the pack plan of `.bin` files.

    Args:
        train_folder: `.../chatml_llamav13_32k/train`.
        names: The files, relative to `train_folder`, as a data order lists them. Their order decides the row
            numbers in mode xtuner. The other modes sort them by name instead.
        max_length: Tokens of a full row.
        mode: best_fit, single or xtuner.
        seed: Seed of the packing and of the row order.
        epochs: Number of epochs whose row order is stored.
        min_length: Documents with fewer tokens are left out, and counted.
        bin_sha256: Digest of each file.
        processed_dir: Folder of the JSONL files, for traces.
        made_with: Tokenizer, template and options of the files, to record in the plan.
        weights: How often the documents of a dataset are seen per epoch. Datasets that are not listed have
            weight 1. Mode xtuner supports only 0 and 1.

    Raises:
        UserError: A file is missing or broken, an argument or a weight is invalid, or no row can be filled.
    """
    if mode not in MODES:
        raise UserError("invalid packing mode", found=mode, expected=", ".join(MODES))
    for name, value, least in (("max_length", max_length, 2), ("seed", seed, 0), ("epochs", epochs, 0)):
        if value < least:
            raise UserError(f"invalid {name}", found=value, expected=f"{least} or more")
    train_folder = Path(train_folder)
    files = [
        {"name": name, "bin_sha256": digest}
        for name, digest in zip(names, bin_sha256 or [None] * len(names), strict=True)
    ]
    if mode != "xtuner":
        files.sort(key=lambda file: file["name"])
    check_weights(weights, {dataset_of(name) for name in names}, mode)
    weights = own_weights(weights)
    documents = _read_documents(train_folder, files)
    long_enough = np.flatnonzero(documents.length >= max(min_length, 1))
    copies = np.zeros(len(documents.length), dtype=np.int64)
    copies[long_enough] = copies_per_epoch(
        documents.file[long_enough],
        documents.sample[long_enough],
        [file["name"] for file in files],
        weights,
        seed,
    )
    kept = np.repeat(np.arange(len(copies)), copies)
    if not len(kept):
        raise UserError(
            f"{train_folder}: no documents to pack",
            found=f"{len(files)} .bin files with {len(documents.length)} documents",
            fix="check the data folder and the data order",
        )
    slices = _MAKERS[mode](documents.chosen(kept), max_length, seed)
    slices = slices._replace(document=kept[slices.document])
    if len(slices.rows) < 2:
        raise _no_row(train_folder, files, max_length)
    return PackPlan(
        mode,
        seed,
        max_length,
        train_folder,
        files,
        slices.rows,
        _records(documents, slices),
        _orders(len(slices.rows) - 1, seed, epochs),
        totals=_count(documents, slices, max_length, min_length, copies)
        | (_count_mixture(documents, copies, files, weights, min_length) if weights else {}),
        processed_dir=processed_dir and Path(processed_dir),
        made_with=made_with,
        weights=weights,
    )


def plan_for_training(
    plan: str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None,
    packed_length: int | None = None,
    data_order_path: str | os.PathLike | None = None,
    seed: int = default_of("packing.seed"),
    min_length: int = 0,
) -> PackPlan:
    """Returns the plan for a training config: opens a plan folder, or packs a train folder as XTuner does.

    Args:
        plan: A plan folder. All other arguments except `folder` are then ignored.
        folder: `.../chatml_llamav13_32k/train`. With a plan: its current place.
        packed_length: Tokens per row.
        data_order_path: A `data_order.txt`; None lists the files of the folder.
        seed: Seed of the order within each file and of the row order; XTuner's is 1024.
        min_length: Documents with fewer tokens are left out.

    Raises:
        UserError: The plan or a file is missing or broken, or no file fills a row.
    """
    if plan is not None:
        return open_plan(plan, folder)
    if folder is None or packed_length is None:
        raise UserError(
            "the config names no training data",
            expected="plan, or folder and packed_length, in train_dataloader.dataset",
            fix="make a plan with plan_packing.py and render a config with --plan",
        )
    names = read_data_order(data_order_path) if data_order_path else list_train_files(folder)
    return make_plan(folder, names, packed_length, "xtuner", seed, min_length=min_length)


def _read_documents(train_folder: Path, files: list[dict]) -> Documents:
    """Reads the meta files. Also adds the counts to the entries of `files`."""
    parts = []
    for number, file in enumerate(files):
        path = train_folder / file["name"]
        meta, size = read_meta(path), path.stat().st_size
        ends = np.append(meta[1:, 0], size) if len(meta) else meta[:, 0]
        lengths = meta[:, 1]
        file |= {"samples": len(meta), "tokens": int(lengths.sum()), "bin_bytes": size}
        parts.append(
            (np.full(len(meta), number), np.arange(len(meta)), lengths, meta[:, 0], ends - meta[:, 0])
        )
    columns = zip(*parts, strict=True) if parts else [[np.zeros(0, dtype=np.int64)]] * 5
    return Documents(*(np.concatenate(column) for column in columns))


def _xtuner(documents: Documents, max_length: int, seed: int) -> Slices:
    """Packs each file separately, as XTuner does."""
    parts: list[Slices] = []
    files, begins = np.unique(documents.file, return_index=True)
    for begin, end in zip(begins, [*begins[1:], len(documents.file)], strict=True):
        order = np.arange(end - begin)
        np.random.RandomState(seed).shuffle(order)
        order += begin
        ends = np.cumsum(documents.length[order])
        rows = int(ends[-1]) // max_length
        cuts = np.arange(rows + 1, dtype=np.int64) * max_length
        # Positions in the concatenated tokens where a slice begins or ends: at every document end and every
        # row end.
        boundaries = np.union1d(ends[ends < cuts[-1]], cuts)
        place = np.searchsorted(ends, boundaries[:-1], side="right")
        document = order[place]
        start = boundaries[:-1] - (ends[place] - documents.length[document])
        parts.append(
            Slices(document, start, start + np.diff(boundaries), np.diff(np.searchsorted(boundaries, cuts)))
        )
    document, start, stop, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Slices(document, start, stop, join_rows(counts))


def _best_fit(documents: Documents, max_length: int, seed: int) -> Slices:
    """Packs all documents together. First cuts documents longer than a row every `max_length` tokens."""
    # Shuffled, so that among documents of equal length, neighbours in a file do not end up in one row.
    order = np.arange(len(documents.length))
    np.random.RandomState(seed).shuffle(order)
    document, start, stop = _pieces(documents, order, max_length)
    by_length = np.argsort(start - stop, kind="stable")
    row = assign_rows((stop - start)[by_length], max_length)
    by_row = by_length[np.argsort(row, kind="stable")]
    return Slices(document[by_row], start[by_row], stop[by_row], join_rows(np.bincount(row)))


def _single(documents: Documents, max_length: int, seed: int) -> Slices:
    """Gives each document a row, or several if it is longer than a row. Only the order of rows uses the seed."""
    document, start, stop = _pieces(documents, np.arange(len(documents.length)), max_length)
    return Slices(document, start, stop, join_rows(np.ones(len(document), dtype=np.int64)))


def _pieces(
    documents: Documents, order: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents every `max_length` tokens. Returns document, start and stop of the pieces, in this order."""
    counts = -(-documents.length[order] // max_length)
    document = np.repeat(order, counts)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * max_length
    return document, start, np.minimum(start + max_length, documents.length[document])


_MAKERS = {"best_fit": _best_fit, "single": _single, "xtuner": _xtuner}


def _records(documents: Documents, slices: Slices) -> np.ndarray:
    records = np.empty(len(slices.document), dtype=SLICE)
    for name in ("file", "sample", "offset", "bytes"):
        records[name] = getattr(documents, name)[slices.document]
    records["start"], records["stop"] = slices.start, slices.stop
    return records


def _orders(rows: int, seed: int, epochs: int) -> np.ndarray:
    orders = np.empty((epochs, rows), dtype=np.int32)
    for epoch in range(epochs):
        orders[epoch] = shuffled_rows(rows, seed, epoch)
    return orders


def _count(
    documents: Documents, slices: Slices, max_length: int, min_length: int, copies: np.ndarray
) -> dict[str, Any]:
    """Returns the totals. Every token is in a row, under `dropped`, or left out by its dataset's weight."""
    rows, sizes = len(slices.rows) - 1, slices.stop - slices.start
    placed = np.bincount(slices.document, weights=sizes, minlength=len(documents.length)).astype(np.int64)
    cut = sizes < documents.length[slices.document]
    short = documents.length < max(min_length, 1)
    lost = documents.length * copies - placed
    waste = rows * max_length - int(sizes.sum())
    reasons = {
        "too_short": (short, documents.length[short]),
        "end_of_file": ((placed == 0) & (copies > 0), lost),
    }
    return {
        "documents": len(documents.length),
        "tokens": int(documents.length.sum()),
        "packed_tokens": int(sizes.sum()),
        "rows": rows,
        "least_rows": -(-int(sizes.sum()) // max_length),
        "waste": {"tokens": waste, "share": waste / (rows * max_length)},
        "cut": {
            "documents": len(np.unique(slices.document[cut])),
            "pieces": int(cut.sum()),
            # They are trained without the beginning of their document, so without its question.
            "tokens_without_beginning": int(sizes[slices.start > 0].sum()),
        },
        "dropped": {
            reason: {"documents": int(which.sum()), "tokens": int(tokens.sum())}
            for reason, (which, tokens) in reasons.items()
        },
    }


def _count_mixture(
    documents: Documents,
    copies: np.ndarray,
    files: list[dict],
    weights: Mapping[str, float],
    min_length: int,
) -> dict[str, Any]:
    """Counts the effect of weights, by dataset. Packed + dropped + left out = all + repeated tokens."""
    by_file = np.array([dataset_of(file["name"]) for file in files])[documents.file]
    usable = documents.length >= max(min_length, 1)
    mixture = {}
    for dataset in np.unique(by_file).tolist():
        mine = (by_file == dataset) & usable
        lengths, times = documents.length[mine], copies[mine]
        extra, out = np.maximum(times - 1, 0), times == 0
        mixture[dataset] = {
            "weight": weights.get(dataset, 1.0),
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "seen": {"documents": int(times.sum()), "tokens": int((times * lengths).sum())},
            "repeated": {"documents": int(extra.sum()), "tokens": int((extra * lengths).sum())},
            "left_out": {"documents": int(out.sum()), "tokens": int(lengths[out].sum())},
        }
    return {"mixture": mixture}


def _no_row(train_folder: Path, files: list[dict], max_length: int) -> UserError:
    largest = max(file["tokens"] for file in files)
    counts = ", ".join(f"{file['name']}: {file['tokens']}" for file in files)
    return UserError(
        f"{train_folder}: no file fills a row of {max_length} tokens, so there is nothing to train on",
        found=f"tokens by file: {counts}",
        expected=f"a file with at least {max_length} tokens (mode xtuner packs each file separately)",
        fix=f"set max_length to {largest} or less, use packing.mode best_fit, or add data",
    )
