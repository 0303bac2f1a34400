"""Tokenises datasets: JSONL files in the processed layout to `.bin` files, and a manifest for each dataset."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import UserError
from common.files import write_json
from ftdp.block_tokenizer import BlockTokenizer, TokenizedBlock, TokenizeOptions
from ftdp.heldout import check_share
from ftdp.layout import TEMPLATE_FOLDER, bin_name, dataset_folder, find_datasets, manifest_path
from ftdp.progress import TokenizeProgress
from ftdp.reading import LineReader
from ftdp.tokenized_writer import write_tokenized
from ftdp.tokenizer import ExtendedTokenizer
from ftdp.workers import WorkerPool

# From here on the faster encoder wins back what making it costs.
_MANY_BYTES = 3_000_000

_SUMS = (
    "source_bytes",
    "bin_bytes",
    "samples",
    "valid_samples",
    "heldout",
    "tokens",
    "trained_tokens",
    "truncated",
)


def tokenize_datasets(
    processed_dir: str | os.PathLike,
    tokenized_dir: str | os.PathLike,
    tokenizer: ExtendedTokenizer,
    options: TokenizeOptions,
    *,
    datasets: list[str] | None = None,
    manifest: str | os.PathLike | None = None,
    processes: int = 1,
) -> dict[str, dict[str, Any]]:
    """Tokenises datasets and writes their manifests, each after its last file.

    A dataset's older files are removed before its first file is written: what is there never mixes two runs, and a
    dataset without a manifest is not finished. Equal input gives equal bytes, whatever `processes` is.

    Args:
        processed_dir: Folder with `<dataset>/processed/.../<file>.jsonl`.
        tokenized_dir: Receives `chatml_llamav13_32k/{train,valid}/cn/<dataset>/`.
        tokenizer: The extended tokenizer.
        options: Length limit and held-out share.
        datasets: Names; None takes all.
        manifest: Where the manifest goes when there is one dataset; by default `manifests/<dataset>.json`.
        processes: Worker processes.

    Returns:
        The manifests by dataset.

    Raises:
        UserError: A dataset is missing, an option is out of range, or a line is not a conversation.
    """
    chosen = _choose(processed_dir, datasets)
    if manifest is not None and len(chosen) != 1:
        raise UserError(
            "--manifest names one file, but there are several datasets",
            found=", ".join(chosen),
            fix="leave --manifest out, or choose one dataset with --dataset",
        )
    if options.max_length < 1:
        raise UserError("the length limit is out of range", found=options.max_length, expected="1 or more")
    check_share(options.heldout_share)
    size = sum(file.stat().st_size for files in chosen.values() for file in files)
    progress = TokenizeProgress(size)
    block_tokenizer = BlockTokenizer(tokenizer, options, many=size >= _MANY_BYTES)
    results = {}
    with WorkerPool(block_tokenizer, processes) as pool:
        for dataset, files in chosen.items():
            target = Path(manifest) if manifest else manifest_path(tokenized_dir, dataset)
            target.unlink(missing_ok=True)
            _clear(tokenized_dir, dataset)
            _remove_unfinished(target)
            job = _DatasetJob(Path(processed_dir), Path(tokenized_dir), dataset, pool, progress)
            results[dataset] = job.run(files, tokenizer, options)
            write_json(target, results[dataset])
    print(f"tokenised {len(results)} datasets: {progress.finish()}", flush=True)
    return results


class _DatasetJob:
    """One dataset: its files one by one, the blocks of each through the pool."""

    def __init__(
        self, processed: Path, tokenized: Path, dataset: str, pool: WorkerPool, progress: TokenizeProgress
    ):
        self._processed, self._tokenized = processed, tokenized
        self._dataset, self._pool, self._progress = dataset, pool, progress
        self._lengths = LengthHistogram()

    def run(
        self, sources: list[Path], tokenizer: ExtendedTokenizer, options: TokenizeOptions
    ) -> dict[str, Any]:
        files = [self._tokenize(source) for source in sources]
        totals = {key: sum(file[key] for file in files) for key in _SUMS}
        totals["longest"] = max(file["longest"] for file in files)
        return {
            "format": 1,
            "dataset": self._dataset,
            "tokenizer_sha256": tokenizer.sha256,
            "options": {
                "max_length": options.max_length,
                "heldout_share": options.heldout_share,
                "heldout_seed": options.heldout_seed,
                "template": TEMPLATE_FOLDER,
            },
            "files": files,
            "totals": totals,
            "length_histogram": self._lengths.as_json(),
            "trained_share": totals["trained_tokens"] / totals["tokens"] if totals["tokens"] else 0.0,
        }

    def _tokenize(self, source: Path) -> dict[str, Any]:
        name = bin_name(source)
        train = dataset_folder(self._tokenized, "train", self._dataset) / name
        valid = dataset_folder(self._tokenized, "valid", self._dataset) / name
        sums = dict.fromkeys(("heldout", "tokens", "trained_tokens", "truncated", "longest"), 0)
        with LineReader(source) as reader:
            blocks = self._pool.map((str(source), block) for block in reader)
            written = write_tokenized(train, valid, self._count(blocks, sums))
        return {
            "source": source.relative_to(self._processed).as_posix(),
            "source_sha256": reader.sha256,
            "source_bytes": reader.size,
            "bin": train.relative_to(self._tokenized).as_posix(),
            "bin_sha256": written.sha256,
            "bin_bytes": written.bytes,
            "meta_sha256": written.meta_sha256,
            "samples": written.samples,
            "valid_samples": written.valid_samples,
            **sums,
        }

    def _count(self, blocks: Iterable[TokenizedBlock], sums: dict[str, int]) -> Iterator[TokenizedBlock]:
        for block in blocks:
            tokens = int(block.lengths.sum())
            sums["heldout"] += block.heldout
            sums["tokens"] += tokens
            sums["trained_tokens"] += block.trained_tokens
            sums["truncated"] += block.truncated
            sums["longest"] = max(sums["longest"], int(block.lengths.max(initial=0)))
            self._lengths.add(block.lengths)
            yield block
            self._progress.update(self._dataset, block.source_bytes, len(block.lengths), tokens)


class LengthHistogram:
    """Counts conversations by length: bin i holds lengths from 2**i to below 2**(i+1) tokens."""

    def __init__(self) -> None:
        self._counts = np.zeros(63, dtype=np.int64)

    def add(self, lengths: np.ndarray) -> None:
        # frexp writes n as m * 2**e with 0.5 <= m < 1.
        bins = np.frexp(lengths.astype(np.float64))[1] - 1
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def as_json(self) -> dict[str, list[int]]:
        used = np.flatnonzero(self._counts)
        bins = int(used[-1]) + 1 if len(used) else 0
        return {"edges": [2**i for i in range(bins + 1)], "counts": self._counts[:bins].tolist()}


def _choose(processed_dir: str | os.PathLike, names: list[str] | None) -> dict[str, list[Path]]:
    found = find_datasets(processed_dir)
    if not names:
        return found
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{processed_dir} holds no dataset {missing[0]!r}",
            found=", ".join(found),
            expected="a folder with processed/.../<file>.jsonl",
            fix="correct --dataset",
        )
    return {name: found[name] for name in dict.fromkeys(names)}


def _clear(tokenized_dir: str | os.PathLike, dataset: str) -> None:
    """Removes a dataset's older tokenised files, and what a killed run left half-written."""
    for split in ("train", "valid"):
        folder = dataset_folder(tokenized_dir, split, dataset)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir()):
            unfinished = path.name.startswith(".") and path.name.endswith(".tmp")
            if unfinished or path.name.endswith((".bin", ".bin.meta")):
                path.unlink()


def _remove_unfinished(target: Path) -> None:
    """Removes what `atomic_path` left of `target` when it was killed."""
    if target.parent.is_dir():
        pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+\.tmp")
        for path in [each for each in target.parent.iterdir() if pattern.fullmatch(each.name)]:
            path.unlink(missing_ok=True)
