"""Records which chunks are done: one record for each finished file and each finished byte range of a file.

    <tokenized_dir>/chunks/<dataset>/<file>/done.json                  the whole file is tokenised
    <tokenized_dir>/chunks/<dataset>/<file>/0003-of-0012.json          a range of it is tokenised, into
    <tokenized_dir>/chunks/<dataset>/<file>/0003-of-0012.{train,valid}.bin and .bin.meta, .quarantine.jsonl

A record is valid if it was made with the same tokenizer, template and options, and if the source and all
outputs still have the recorded bytes. Equal size and mtime count as equal bytes, but only if the mtime was
old enough when the bytes were read. Otherwise the bytes are hashed again and the new mtime is recorded.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from snaketune.chat_files.range_reader import RangeReader
from snaketune.common.files import sha256_file
from snaketune.tokenized.job_parts import Chunk
from snaketune.tokenized.layout import (
    BIN,
    SPLITS,
    bin_name,
    dataset_folder,
    meta_path,
    quarantine_path,
    records_folder,
)

# A file written this recently could change again without changing its mtime.
_CLOCK_NS = 2_000_000_000
# Increase when the content of records changes. Chunks with records of a different format are tokenised again.
_FORMAT = 2


class ChunkStore:
    """The records and files below one tokenised folder.

    Args:
        tokenized_dir: The folder.
        identity: Everything besides the source that decides the bytes, see `identity.tokenize_identity`.
        max_bad_share: Share of a file's lines that may be bad; 0 if a bad line stops the run.
    """

    def __init__(
        self, tokenized_dir: str | os.PathLike, identity: dict[str, Any], max_bad_share: float = 1.0
    ):
        self.root = Path(tokenized_dir)
        self.identity = identity
        self._max_bad_share = max_bad_share

    def folder(self, dataset: str, source: Path) -> Path:
        """Returns the folder of a file's records."""
        return records_folder(self.root, dataset) / source.stem

    def bins(self, chunk: Chunk) -> dict[str, Path]:
        """Returns the paths of a chunk's train file, valid file and quarantine."""
        if chunk.count == 1:
            name = bin_name(chunk.source)
            quarantine = quarantine_path(self.root, chunk.dataset, name)
            parts = {split: dataset_folder(self.root, split, chunk.dataset) / name for split in SPLITS}
        else:
            folder, stem = self.folder(chunk.dataset, chunk.source), _stem(chunk)
            quarantine = folder / f"{stem}.quarantine.jsonl"
            parts = {split: folder / f"{stem}.{split}{BIN}" for split in SPLITS}
        return parts | {"quarantine": quarantine}

    def outputs(self, chunk: Chunk) -> list[Path]:
        """Returns the paths of all files that a chunk may have written."""
        paths = self.bins(chunk)
        bins = [paths[split] for split in SPLITS]
        return [path for each in bins for path in (each, meta_path(each))] + [paths["quarantine"]]

    def record_path(self, chunk: Chunk) -> Path:
        """Returns the path of a chunk's record."""
        name = "done" if chunk.count == 1 else _stem(chunk)
        return self.folder(chunk.dataset, chunk.source) / f"{name}.json"

    def recorded(self, dataset: str, source: Path) -> list[Chunk]:
        """Returns the chunks that a file was last split into, done or not; the whole file if it was never split.

        This way, merging need not know the sizes that the split was made with.
        """
        whole = Chunk(dataset, source)
        if self.record_path(whole).exists():
            return [whole]
        stamps = {}
        with suppress(OSError):
            for path in self.folder(dataset, source).iterdir():
                if match := re.fullmatch(r"\d+-of-(\d+)\.json", path.name):
                    count = int(match[1])
                    stamps[count] = max(stamps.get(count, 0), path.stat().st_mtime_ns)
        if not stamps:
            return [whole]
        count = max(stamps, key=stamps.__getitem__)
        return [Chunk(dataset, source, index, count) for index in range(count)]

    def find(self, chunk: Chunk) -> dict[str, Any] | None:
        """Returns the valid record of a chunk, or None if the chunk is not done."""
        record = _read(self.record_path(chunk))
        if (
            not record
            or record.get("format") != _FORMAT
            or record.get("identity") != self.identity
            or record.get("place") != [chunk.index, chunk.count]
        ):
            return None
        try:
            stamps = _stamps(record)
            if self._has_too_many_bad(record["result"]["tally"]["sums"], chunk):
                return None
            if not self._same_outputs(record, chunk) or not _same_source(record["bytes_of"], chunk):
                return None
        except (OSError, KeyError, TypeError):
            return None
        if _stamps(record) != stamps:
            with suppress(OSError):
                self._write(chunk, record)
        return record

    def digest(self, chunk: Chunk) -> str:
        """Returns the source digest of a finished chunk, or of its file if the whole file is done."""
        record = _read(self.record_path(chunk.whole)) or _read(self.record_path(chunk)) or {}
        return record["bytes_of"]["sha256"]

    def forget(self, chunk: Chunk) -> None:
        """Removes a chunk's record, then its files."""
        for path in [self.record_path(chunk), *self.outputs(chunk)]:
            path.unlink(missing_ok=True)

    def save(self, chunk: Chunk, state: SourceState, sha256: str, result: dict[str, Any]) -> dict[str, Any]:
        """Writes the record of a chunk whose files are in place, and returns it.

        Args:
            chunk: The chunk.
            state: State of the source before it was read.
            sha256: Digest of the chunk's lines.
            result: Result to record.
        """
        outputs = {}
        for path in self.outputs(chunk):
            if path.exists():
                stat = path.stat()
                name = path.relative_to(self.root).as_posix()
                outputs[name] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": None}
        for name, digest in result.pop("digests", {}).items():
            outputs[name]["sha256"] = digest
        for name, output in outputs.items():
            output["sha256"] = output["sha256"] or sha256_file(self.root / name)
        record = {
            "format": _FORMAT,
            "identity": self.identity,
            "place": [chunk.index, chunk.count],
            "bytes_of": {"size": state.size, "mtime_ns": state.mtime_ns, "sha256": sha256},
            "outputs": outputs,
            "result": result,
        }
        self.record_path(chunk).parent.mkdir(parents=True, exist_ok=True)
        self._write(chunk, record)
        return record

    def _write(self, chunk: Chunk, record: dict[str, Any]) -> None:
        path = self.record_path(chunk)
        # Not flushed to disk: losing a record only means tokenising the chunk again.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(record, sort_keys=True), encoding="utf-8")
        temporary.replace(path)

    def _has_too_many_bad(self, sums: dict[str, int], chunk: Chunk) -> bool:
        # The share applies to the whole file. A range can only be checked against "none".
        share = self._max_bad_share if chunk.count == 1 or not self._max_bad_share else 1.0
        return sums["quarantined"] > share * sums["lines"]

    def _same_outputs(self, record: dict[str, Any], chunk: Chunk) -> bool:
        there = {path.relative_to(self.root).as_posix() for path in self.outputs(chunk) if path.exists()}
        if there != set(record["outputs"]):
            return False
        for name, known in record["outputs"].items():
            path = self.root / name
            stat = path.stat()
            if stat.st_size != known["bytes"]:
                return False
            if stat.st_mtime_ns != known["mtime_ns"]:
                if sha256_file(path) != known["sha256"]:
                    return False
                known["mtime_ns"] = stat.st_mtime_ns
        return True


class SourceState:
    """The state of a source before it is read.

    Attributes:
        size: Bytes.
        mtime_ns: The mtime, or None if it is too recent to prove that the content is unchanged.
    """

    def __init__(self, source: Path):
        stat = source.stat()
        self.size = stat.st_size
        self.mtime_ns = stat.st_mtime_ns if time.time_ns() - stat.st_mtime_ns > _CLOCK_NS else None


def _same_source(known: dict[str, Any], chunk: Chunk) -> bool:
    state = SourceState(chunk.source)
    if state.size != known["size"]:
        return False
    if state.mtime_ns is not None and state.mtime_ns == known["mtime_ns"]:
        return True
    with RangeReader(chunk.source, *chunk.range(state.size)) as reader:
        for _ in reader:
            pass
    if reader.sha256 != known["sha256"]:
        return False
    known["mtime_ns"] = state.mtime_ns
    return True


def _stamps(record: dict[str, Any]) -> list[int | None]:
    return [record["bytes_of"]["mtime_ns"], *(output["mtime_ns"] for output in record["outputs"].values())]


def remove_unfinished(folders: Iterable[Path]) -> None:
    """Removes temporary files of killed jobs from folders that no job is writing to."""
    for folder in folders:
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name.startswith(".") and path.name.endswith(".tmp") and path.is_file():
                    path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _stem(chunk: Chunk) -> str:
    return f"{chunk.index + 1:04d}-of-{chunk.count:04d}"
