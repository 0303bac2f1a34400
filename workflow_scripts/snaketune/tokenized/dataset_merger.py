"""Joins the ranges of split files and writes the manifests, once everything is tokenised.

The result has the same bytes as a single job that tokenises the whole file: ranges are joined in order, and
the copies for the valid folder are counted over the whole file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from snaketune.common.cli import UserError
from snaketune.common.files import atomic_path, write_json
from snaketune.tokenized.bin_writer import Lines, read_tokenized, write_tokenized
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.chunk_store import ChunkStore, SourceState, remove_unfinished
from snaketune.tokenized.chunk_writer import EMPTY, digests, refuse_too_many_in
from snaketune.tokenized.job_parts import Chunk
from snaketune.tokenized.layout import (
    BIN,
    META,
    SPLITS,
    bin_name,
    dataset_folder,
    manifest_path,
    manifests_folder,
    quarantine_folder,
    quarantine_path,
    records_folder,
    stats_path,
)
from snaketune.tokenized.manifests import build_manifest, list_manifests, read_manifest
from snaketune.tokenized.stats import write_stats
from snaketune.tokenized.tally import Tally

_READ_BYTES = 1 << 20


class Finisher:
    """Finishes datasets of one tokenised folder.

    Args:
        store: The folder's records and files.
        processed_dir: Folder of the sources; manifests record their paths relative to it.
        options: Options of the tokenisation.
    """

    def __init__(
        self,
        store: ChunkStore,
        processed_dir: str | os.PathLike,
        options: TokenizeOptions,
    ):
        self.store = store
        self._processed, self._options = Path(processed_dir), options

    def reopen(self, chunk: Chunk) -> None:
        """Marks a chunk as not done: removes its dataset's manifest, its file's record, its own, and the outputs."""
        manifest_path(self.store.root, chunk.dataset).unlink(missing_ok=True)
        self.store.forget(chunk.whole)
        if chunk.count > 1:
            self.store.forget(chunk)
        for split in SPLITS:
            dataset_folder(self.store.root, split, chunk.dataset).mkdir(parents=True, exist_ok=True)

    def finish(self, dataset: str, chunks: list[Chunk]) -> dict[str, Any]:
        """Joins ranges, removes files without a source, and writes and returns the manifest.

        Args:
            dataset: The dataset's name.
            chunks: All chunks of its files.

        Raises:
            UserError: A chunk is not done, or its source changed.
        """
        by_source: dict[Path, list[Chunk]] = {}
        for chunk in sorted(chunks):
            by_source.setdefault(chunk.source, []).append(chunk)
        records = {source: self._finish_file(own) for source, own in by_source.items()}
        self._remove_strangers(dataset, list(by_source))
        tally = Tally.merged([record["result"]["tally"] for record in records.values()])
        manifest = self._build_manifest(dataset, records, tally)
        path = manifest_path(self.store.root, dataset)
        if not _holds(path, manifest) or not stats_path(path).exists():
            write_stats(path, manifest, self.store.root, tally.untrained)
            write_json(path, manifest)
        return manifest

    def _finish_file(self, chunks: list[Chunk]) -> dict[str, Any]:
        whole = chunks[0].whole
        record = self.store.find(whole)
        if record is None:
            found = [self.store.find(chunk) for chunk in chunks] if len(chunks) > 1 else [None]
            for chunk, one in zip(chunks, found, strict=True):
                if one is None:
                    part = f", part {chunk.index + 1} of {chunk.count}," if chunk.count > 1 else ""
                    raise UserError(
                        f"{chunk.source}{part} is not tokenised, or has changed since",
                        expected="every part tokenised with this tokenizer and these options",
                        fix="run again: only missing parts are tokenised",
                    )
            manifest_path(self.store.root, whole.dataset).unlink(missing_ok=True)
            self.store.forget(whole)
            record = self._join(chunks, found)
        # Files of ranges, finished or not, including those of an earlier split into more or fewer ranges.
        folder = self.store.folder(whole.dataset, whole.source)
        for path in [each for each in folder.iterdir() if each.name != "done.json"]:
            path.unlink(missing_ok=True)
        return record

    def _join(self, chunks: list[Chunk], records: list[dict[str, Any]]) -> dict[str, Any]:
        whole = chunks[0].whole
        paths = self.store.bins(whole)
        parts = [self.store.bins(chunk) for chunk in chunks]
        tally = Tally.merged([record["result"]["tally"] for record in records])
        bad = [part["quarantine"] for part in parts if part["quarantine"].exists()]
        if bad:
            with atomic_path(paths["quarantine"]) as temporary, open(temporary, "wb") as target:
                for path in bad:
                    with open(path, "rb") as source:
                        shutil.copyfileobj(source, target, _READ_BYTES)
        refuse_too_many_in(whole, tally, self._options, paths["quarantine"])
        state = SourceState(whole.source)
        sha256 = _joined_digest(chunks, records)

        def lines() -> Iterator[tuple[Lines, Lines | None]]:
            for part in parts:
                yield from ((each, None) for each in read_tokenized(part["train"]))
            for part in parts:
                if part["valid"].exists():
                    yield from ((EMPTY, each) for each in read_tokenized(part["valid"]))

        written = write_tokenized(paths["train"], paths["valid"], lines(), copy=self._options.valid == "copy")
        result = {
            "tally": tally.as_json(),
            "written": written._asdict(),
            "digests": digests(self.store, paths, written),
        }
        record = self.store.save(whole, state, sha256, result)
        for chunk in chunks:
            self.store.forget(chunk)
        return record

    def _remove_strangers(self, dataset: str, sources: list[Path]) -> None:
        """Removes tokenised files and records of sources that no longer exist, and temporary files."""
        bins = {bin_name(source) for source in sources}
        folders = [dataset_folder(self.store.root, split, dataset) for split in SPLITS]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            for path in list(folder.iterdir()):
                name = path.name.removesuffix(META)
                if name.endswith(BIN) and name not in bins and not name.startswith("."):
                    path.unlink()
        quarantine = quarantine_folder(self.store.root, dataset)
        kept = {quarantine_path(self.store.root, dataset, name) for name in bins}
        for path in set(quarantine.glob("*.quarantine.jsonl")) - kept:
            path.unlink()
        records = {self.store.folder(dataset, source) for source in sources}
        for folder in set(records_folder(self.store.root, dataset).iterdir()) - records:
            shutil.rmtree(folder, ignore_errors=True)
        remove_unfinished([*folders, quarantine])
        for path in self._unfinished_manifests.get(manifest_path(self.store.root, dataset).name, ()):
            path.unlink(missing_ok=True)

    @cached_property
    def _unfinished_manifests(self) -> dict[str, list[Path]]:
        """Temporary files of killed jobs, by the name of the manifest they were for.

        Listed once: listing the folder for each of thousands of datasets would take quadratic time.
        """
        found: dict[str, list[Path]] = {}
        for path in manifests_folder(self.store.root).glob(".*.*.tmp"):
            name, _, _ = path.name[1:].rsplit(".", 2)
            found.setdefault(name, []).append(path)
        return found

    def _build_manifest(
        self, dataset: str, records: dict[Path, dict[str, Any]], tally: Tally
    ) -> dict[str, Any]:
        files = [self._entry(dataset, source, record) for source, record in records.items()]
        return build_manifest(dataset, self.store.identity, files, tally.counts, tally.histogram.as_json())

    def _entry(self, dataset: str, source: Path, record: dict[str, Any]) -> dict[str, Any]:
        tally, written = record["result"]["tally"], record["result"]["written"]
        sums = tally["sums"]
        moved = written["valid_samples"] if self._options.valid == "holdout" else 0
        if sums["lines"] != written["samples"] + moved + sums["heldout"] + sums["quarantined"]:
            raise AssertionError(f"{source}: the results do not account for all lines: {sums}, {written}")
        if tally["source_bytes"] != record["bytes_of"]["size"]:
            raise AssertionError(f"{source}: not every byte was tokenised: {tally}, {record['bytes_of']}")
        train = self.store.bins(Chunk(dataset, source))["train"]
        return {
            "source": source.relative_to(self._processed).as_posix(),
            "source_sha256": record["bytes_of"]["sha256"],
            "source_bytes": record["bytes_of"]["size"],
            "bin": train.relative_to(self.store.root).as_posix(),
            "bin_sha256": written["sha256"],
            "bin_bytes": written["bytes"],
            "meta_sha256": written["meta_sha256"],
            "samples": written["samples"],
            "valid_samples": written["valid_samples"],
            **sums,
            "longest": max((tokens for tokens, *_ in tally["longest_samples"]), default=0),
            "longest_samples": [
                {"sample": sample, "line": line, "tokens": tokens}
                for tokens, sample, line in tally["longest_samples"]
            ],
            "counts": tally["counts"],
        }


def remove_other_datasets(tokenized_dir: str | os.PathLike, keep: set[str]) -> list[str]:
    """Removes datasets from a tokenised folder that have a manifest and are not in `keep`. Returns their names."""
    root = Path(tokenized_dir)
    removed = []
    for path in list_manifests(root):
        with suppress(UserError):
            name = read_manifest(path)["dataset"]
            if name in keep or name in (".", "..") or "/" in name or path != manifest_path(root, name):
                continue
            path.unlink()
            folders = [dataset_folder(root, split, name) for split in SPLITS]
            for folder in [*folders, records_folder(root, name), quarantine_folder(root, name)]:
                shutil.rmtree(folder, ignore_errors=True)
            removed.append(name)
    return removed


def _joined_digest(chunks: list[Chunk], records: list[dict[str, Any]]) -> str:
    """Returns the digest of a whole file. Checks that its ranges are the bytes that were tokenised.

    Raises:
        UserError: The file changed between two parts.
    """
    digest = hashlib.sha256()
    with open(chunks[0].source, "rb") as file:
        for record in records:
            own = hashlib.sha256()
            left = record["result"]["tally"]["source_bytes"]
            while left and (data := file.read(min(left, _READ_BYTES))):
                digest.update(data)
                own.update(data)
                left -= len(data)
            if own.hexdigest() != record["bytes_of"]["sha256"]:
                break
        else:
            if not file.read(1):
                return digest.hexdigest()
    raise UserError(
        f"{chunks[0].source} changed while its parts were tokenised",
        expected="a file that does not change",
        fix="run again when nothing writes to the file",
    )


def _holds(path: Path, value: Any) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")) == value
    except (OSError, ValueError):
        return False
