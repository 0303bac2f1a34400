"""Tokenises datasets: from JSONL files in the processed layout to `.bin` files and one manifest per dataset.

The work is split into parts (see `job_parts`), which may run as separate jobs on several machines that share
the folder. Finished files and ranges are recorded (see `chunk_store`), so a restarted part does only the
rest. Once all parts are done, ranges are joined and manifests written (see `dataset_merger`). Without parts,
one process does it all.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from snaketune.chat_files.line_choice import check_share
from snaketune.chat_files.line_reader import Block
from snaketune.chat_files.processed_layout import find_datasets
from snaketune.chat_files.range_reader import RangeReader
from snaketune.common.cli import UserError
from snaketune.common.files import write_json
from snaketune.common.progress import Progress
from snaketune.common.worker_pool import WorkerPool
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.tokenized.block_tokenizer import BlockTokenizer, TokenizedBlock, TokenizeOptions
from snaketune.tokenized.chunk_store import ChunkStore, SourceState
from snaketune.tokenized.chunk_tokenizer import ChunkTokenizer
from snaketune.tokenized.chunk_writer import write_chunk
from snaketune.tokenized.dataset_merger import Finisher, remove_other_datasets
from snaketune.tokenized.identity import tokenize_identity
from snaketune.tokenized.job_parts import (
    DEFAULT_BATCH_BYTES,
    DEFAULT_SHARD_BYTES,
    Chunk,
    file_sizes,
    split_parts,
)
from snaketune.tokenized.manifests import write_index

# Datasets that are merged at the same time.
_MERGING = 8


def tokenize_datasets(
    processed_dir: str | os.PathLike,
    tokenized_dir: str | os.PathLike,
    tokenizer: ExtendedTokenizer,
    options: TokenizeOptions,
    *,
    datasets: list[str] | None = None,
    processes: int = 1,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> dict[str, dict[str, Any]]:
    """Tokenises datasets and writes the manifest of each after its last file.

    Keeps files that are already done with the same content, tokenizer and options. If a file of a dataset has
    to be done, the dataset's manifest is removed first: a dataset without a manifest is not finished. Equal
    input gives equal bytes, whatever the values of `processes` and `shard_bytes`, and however often the work
    was interrupted.

    Args:
        processed_dir: Folder with `<dataset>/processed/.../<file>.jsonl`.
        tokenized_dir: Receives `chatml_llamav13_32k/{train,valid}/cn/<dataset>/`, `manifests/`, `chunks/`.
        tokenizer: The extended tokenizer.
        options: Options that decide the bytes and the handling of bad lines.
        datasets: Dataset names; None uses all.
        processes: Worker processes.
        shard_bytes: Progress within a file is recorded about every this many bytes.

    Returns:
        The manifests by dataset.

    Raises:
        UserError: A dataset is missing, an option is out of range, or a line is bad.
    """
    chosen = choose_datasets(processed_dir, datasets)
    check_options(options)
    store = _open_store(tokenized_dir, tokenizer, options)
    finisher = Finisher(store, processed_dir, options)
    sizes = file_sizes(chosen)
    parts = split_parts(chosen, sizes, shard_bytes, DEFAULT_BATCH_BYTES)
    chunks = sorted(chunk for part in parts.values() for chunk in part)
    unfinished = _Unfinished(finisher, chosen, chunks)
    run = _Run(finisher, tokenizer, options, processes)
    for chunk in run.run(chunks, sizes):
        unfinished.done(chunk)
    print(f"tokenised {len(chosen)} datasets: {run.status}", flush=True)
    return unfinished.manifests


def tokenize_part(
    processed_dir: str | os.PathLike,
    tokenized_dir: str | os.PathLike,
    tokenizer: ExtendedTokenizer,
    options: TokenizeOptions,
    part: str,
    *,
    datasets: list[str] | None = None,
    marker: str | os.PathLike | None = None,
    processes: int = 1,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    batch_bytes: int = DEFAULT_BATCH_BYTES,
) -> str:
    """Tokenises one part, writes no manifests, and returns a status message.

    Args:
        part: Name of the part, see `split_parts`.
        marker: JSON file written last, for a scheduler: the chunks of the part.
        batch_bytes: Target size of a batch of small files. Other arguments: see `tokenize_datasets`.

    Raises:
        UserError: As for `tokenize_datasets`; or there is no such part, because the data changed since the
            split.
    """
    check_options(options)
    chosen = choose_datasets(processed_dir, datasets)
    sizes = file_sizes(chosen)
    parts = split_parts(chosen, sizes, shard_bytes, batch_bytes)
    if part not in parts:
        raise UserError(
            f"there is no part {part!r}",
            found=", ".join(list(parts)[:8]) + (", ..." if len(parts) > 8 else ""),
            expected="a part of the current data",
            fix="start the workflow again: the data have changed since they were split into parts",
        )
    store = _open_store(tokenized_dir, tokenizer, options)
    run = _Run(Finisher(store, processed_dir, options), tokenizer, options, processes)
    done = list(run.run(parts[part], sizes))
    if marker:
        files = {
            f"{chunk.source.relative_to(processed_dir).as_posix()} {chunk.index + 1}/{chunk.count}": sha256
            for chunk, sha256 in zip(done, map(store.digest, done), strict=True)
        }
        write_json(marker, {"format": 1, "part": part, "identity": store.identity, "chunks": files})
    return run.status


def merge_parts(
    processed_dir: str | os.PathLike,
    tokenized_dir: str | os.PathLike,
    tokenizer: ExtendedTokenizer,
    options: TokenizeOptions,
    *,
    datasets: list[str] | None = None,
    index: str | os.PathLike | None = None,
    prune: bool = False,
) -> dict[str, dict[str, Any]]:
    """Joins the ranges of split files and writes the manifests once every part is done. Tokenises nothing.

    Args:
        index: JSON file written last, with the digest of every manifest.
        prune: Remove datasets from the tokenised folder that are not requested.
            Other arguments: see `tokenize_datasets`.

    Returns:
        The manifests by dataset.

    Raises:
        UserError: A part is missing or was made differently, or its source changed.
    """
    chosen = choose_datasets(processed_dir, datasets)
    store = _open_store(tokenized_dir, tokenizer, options)
    finisher = Finisher(store, processed_dir, options)
    if prune:
        for name in remove_other_datasets(tokenized_dir, set(chosen)):
            print(f"{name}: removed, no longer among the datasets", flush=True)

    def finish(name: str) -> dict[str, Any]:
        return finisher.finish(
            name, [chunk for source in chosen[name] for chunk in store.recorded(name, source)]
        )

    # Most of the time goes into flushing each manifest to disk.
    with ThreadPoolExecutor(_MERGING) as pool:
        manifests = dict(zip(chosen, pool.map(finish, chosen), strict=True))
    if index:
        write_index(index, manifests)
    return manifests


def _open_store(
    tokenized_dir: str | os.PathLike, tokenizer: ExtendedTokenizer, options: TokenizeOptions
) -> ChunkStore:
    max_bad_share = options.max_bad_share if options.on_bad_sample == "quarantine" else 0.0
    return ChunkStore(tokenized_dir, tokenize_identity(tokenizer, options), max_bad_share)


def choose_datasets(processed_dir: str | os.PathLike, names: list[str] | None) -> dict[str, list[Path]]:
    """Returns the JSONL files of the named datasets, or of all.

    Raises:
        UserError: A dataset does not exist.
    """
    found = find_datasets(processed_dir)
    if not names:
        return found
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{processed_dir} has no dataset {missing[0]!r}",
            found=", ".join(found),
            expected="a folder with processed/.../<file>.jsonl",
            fix="correct --dataset",
        )
    return {name: found[name] for name in dict.fromkeys(names)}


def check_options(options: TokenizeOptions) -> None:
    """Raises a UserError if an option is out of range."""
    if options.max_length < 1:
        raise UserError("the length limit is out of range", found=options.max_length, expected="1 or more")
    check_share(options.heldout_share)
    check_share(options.valid_share, "valid")
    if not 0 <= options.max_bad_share <= 1:
        raise UserError("--max-bad-share is out of range", found=options.max_bad_share, expected="0 to 1")


class _Run:
    """Tokenises the chunks of one process: all unfinished ones pass through one pool, as one stream of blocks.

    Attributes:
        status: Message about the amount and speed of the work, set at the end.
    """

    def __init__(
        self, finisher: Finisher, tokenizer: ExtendedTokenizer, options: TokenizeOptions, processes: int
    ):
        self._finisher, self._store = finisher, finisher.store
        self._tokenizer, self._options, self._processes = tokenizer, options, processes
        self.status = ""

    def run(self, chunks: list[Chunk], sizes: dict[Path, int]) -> Iterator[Chunk]:
        """Yields each chunk once its files and its record exist."""
        missing = [chunk for chunk in chunks if not self._is_done(chunk)]
        for chunk in missing:
            self._finisher.reopen(chunk)
        yield from sorted(set(chunks) - set(missing))
        total = sum(end - start for start, end in (chunk.range(sizes[chunk.source]) for chunk in missing))
        progress = Progress("bytes", total, "documents", "tokens")
        tokenizer = BlockTokenizer(self._tokenizer, self._options)
        with WorkerPool(ChunkTokenizer(tokenizer), self._processes) as pool:
            yield from self._tokenize(missing, pool, progress)
        self.status = progress.finish()
        if kept := len(chunks) - len(missing):
            before = f"{kept} of {len(chunks)} files or ranges were already done"
            self.status = f"{self.status}; {before}" if missing else before

    def _is_done(self, chunk: Chunk) -> bool:
        return self._store.find(chunk.whole) is not None or (
            chunk.count > 1 and self._store.find(chunk) is not None
        )

    def _tokenize(self, chunks: list[Chunk], pool: WorkerPool, progress: Progress) -> Iterator[Chunk]:
        order: deque[int] = deque()
        read: dict[int, tuple[SourceState, str]] = {}
        results = pool.map(_blocks(chunks, order, read))
        # The reader is ahead of the results: each result's chunk number is already in `order`, and a chunk's
        # digest is in `read` by the time its last result arrives.
        numbered = ((order.popleft(), result) for result in results)
        for number, group in groupby(numbered, itemgetter(0)):
            chunk = chunks[number]
            blocks = self._shown(chunk, (result for _, result in group), progress)
            result = write_chunk(self._store, chunk, self._options, blocks)
            self._store.save(chunk, *read.pop(number), result)
            yield chunk

    def _shown(
        self, chunk: Chunk, blocks: Iterable[tuple[int, TokenizedBlock]], progress: Progress
    ) -> Iterator[tuple[int, TokenizedBlock]]:
        for lines, block in blocks:
            yield lines, block
            tokens = int(block.lengths.sum())
            progress.add(chunk.dataset, bytes=block.source_bytes, documents=len(block.lengths), tokens=tokens)


def _blocks(
    chunks: list[Chunk], order: deque[int], read: dict[int, tuple[SourceState, str]]
) -> Iterator[tuple[str, Block, int]]:
    """Yields arguments for `ChunkTokenizer`. Notes each block's chunk in `order`, each chunk's digest in `read`."""
    for number, chunk in enumerate(chunks):
        state = SourceState(chunk.source)
        with RangeReader(chunk.source, *chunk.range(state.size)) as reader:
            # An empty chunk also needs a block, so that its files are written.
            for block in chain(reader, [Block(1, [], 0)]):
                if block.lines or not reader.bytes_read:
                    order.append(number)
                    yield str(chunk.source), block, reader.first_byte
        read[number] = state, reader.sha256


class _Unfinished:
    """Writes a dataset's manifest as soon as its last chunk is done."""

    def __init__(self, finisher: Finisher, datasets: dict[str, list[Path]], chunks: list[Chunk]):
        self._finisher = finisher
        self._chunks: dict[str, list[Chunk]] = {name: [] for name in datasets}
        for chunk in chunks:
            self._chunks[chunk.dataset].append(chunk)
        self._left = {name: len(own) for name, own in self._chunks.items()}
        self.manifests: dict[str, dict[str, Any]] = dict.fromkeys(datasets, {})

    def done(self, chunk: Chunk) -> None:
        name = chunk.dataset
        self._left[name] -= 1
        if not self._left[name]:
            self.manifests[name] = self._finisher.finish(name, self._chunks[name])
