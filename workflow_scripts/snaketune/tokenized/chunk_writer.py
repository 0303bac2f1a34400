"""Writes the results of a chunk: train and valid files, bad lines, and the sums for its record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from snaketune.chat_files.quarantine import QuarantineFile, quarantine_record, refuse_too_many
from snaketune.tokenized.bin_writer import Lines, Written, write_tokenized
from snaketune.tokenized.block_tokenizer import TokenizedBlock, TokenizeOptions
from snaketune.tokenized.chunk_store import ChunkStore
from snaketune.tokenized.job_parts import Chunk
from snaketune.tokenized.layout import meta_path
from snaketune.tokenized.tally import Tally

EMPTY = Lines(b"", np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


def write_chunk(
    store: ChunkStore, chunk: Chunk, options: TokenizeOptions, blocks: Iterable[tuple[int, TokenizedBlock]]
) -> dict[str, Any]:
    """Writes a chunk's files and returns the result for its record.

    Args:
        store: Gives the paths.
        chunk: A whole file or a range. For ranges, `dataset_merger` makes the copies for the valid folder
            later.
        options: Decide which documents move to the valid folder, and how many bad lines are allowed.
        blocks: Pairs of the number of lines and the tokenised block.

    Raises:
        UserError: Too many lines of a whole file are bad. Only the quarantine file is written.
    """
    paths = store.bins(chunk)
    tally = Tally()
    holdout = options.valid == "holdout"

    def parts() -> Iterator[tuple[Lines, Lines | None]]:
        for lines, block in blocks:
            train = Lines(block.data, block.line_bytes, block.lengths)
            moved = None
            if holdout and block.for_valid.any():
                train, moved = train.chosen(~block.for_valid), train.chosen(block.for_valid)
            tally.add(lines, block, train, moved)
            for number, raw, reason in block.quarantined:
                quarantine.add(quarantine_record(chunk.source.name, number, raw, reason))
            yield train, moved
        if chunk.count == 1:
            # Raises before any file is renamed to its final name.
            refuse_too_many_in(chunk, tally, options, paths["quarantine"])

    with QuarantineFile(paths["quarantine"]) as quarantine:
        copy = options.valid == "copy" and chunk.count == 1
        written = write_tokenized(paths["train"], paths["valid"], parts(), copy=copy)
    return {"tally": tally.as_json(), "written": written._asdict(), "digests": digests(store, paths, written)}


def digests(store: ChunkStore, paths: dict[str, Path], written: Written) -> dict[str, str]:
    """Returns the digests that are already known, by output name."""
    path = paths["train"].relative_to(store.root)
    return {path.as_posix(): written.sha256, meta_path(path).as_posix(): written.meta_sha256}


def refuse_too_many_in(chunk: Chunk, tally: Tally, options: TokenizeOptions, quarantine: Path) -> None:
    """Raises a UserError if more than `max_bad_share` of a file's lines are bad."""
    sums = tally.sums
    refuse_too_many(
        str(chunk.source), sums["quarantined"], sums["lines"], options.max_bad_share, str(quarantine)
    )
