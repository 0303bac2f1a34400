"""What is done already, decided by content: a record for each finished file and for each finished range of one.

    <tokenized_dir>/chunks/<dataset>/<file>/done.json                  the file is tokenised and in its place
    <tokenized_dir>/chunks/<dataset>/<file>/0003-of-0012.json          a range of it is, and lies beside
    <tokenized_dir>/chunks/<dataset>/<file>/0003-of-0012.{train,valid}.bin and .bin.meta, .quarantine.jsonl

A record is believed when it was made with the same tokenizer, template and options, the source still has the bytes that
it was made from, and every output has the bytes that were written. Equal size and time stamp stand for equal bytes, but
only where the time stamp was old when the bytes were read; otherwise they are hashed again, and the new stamp noted.
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

# A file changed within the resolution of a clock could change again unseen.
_CLOCK_NS = 2_000_000_000
# Raised when records hold something new: those of another format are made again.
_FORMAT = 2


class ChunkStore:
    """The records and files below one tokenised folder.

    Args:
        tokenized_dir: The folder.
        identity: What decides the bytes besides the source: JSON of the tokenizer's digest, the template, the options.
        max_bad_share: Share of a file's lines that may be bad; 0 where a bad line stops the run.
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
        """Returns where a chunk's train and valid part and its bad lines go."""
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
        """Returns every file that a chunk may have written."""
        paths = self.bins(chunk)
        bins = [paths[split] for split in SPLITS]
        return [path for each in bins for path in (each, meta_path(each))] + [paths["quarantine"]]

    def record_path(self, chunk: Chunk) -> Path:
        """Returns the place of a chunk's record."""
        name = "done" if chunk.count == 1 else _stem(chunk)
        return self.folder(chunk.dataset, chunk.source) / f"{name}.json"

    def recorded(self, dataset: str, source: Path) -> list[Chunk]:
        """Returns the chunks that a file was last cut into, whether done or not; the whole file if there are none.

        Merging so needs not know the sizes that the plan was made with.
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
        """Returns the record of a finished chunk, or None when it has to be done."""
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
        """Returns the digest of the bytes that a finished chunk (or the file that it is in) was made from."""
        record = _read(self.record_path(chunk.whole)) or _read(self.record_path(chunk)) or {}
        return record["bytes_of"]["sha256"]

    def forget(self, chunk: Chunk) -> None:
        """Removes a chunk's record first, then its files."""
        for path in [self.record_path(chunk), *self.outputs(chunk)]:
            path.unlink(missing_ok=True)

    def save(self, chunk: Chunk, state: SourceState, sha256: str, result: dict[str, Any]) -> dict[str, Any]:
        """Writes the record of a chunk whose files are in place, and returns it.

        Args:
            chunk: The chunk.
            state: The source as it was before it was read.
            sha256: Of the bytes of the chunk's lines.
            result: What to remember of it.
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
        # Not flushed to disk: a record that is lost or broken costs doing the chunk again, no more.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(record, sort_keys=True), encoding="utf-8")
        temporary.replace(path)

    def _has_too_many_bad(self, sums: dict[str, int], chunk: Chunk) -> bool:
        # Of a range only "none" can be asked: the share is that of the whole file.
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
    """A source as it is before it is read.

    Attributes:
        size: Its bytes.
        mtime_ns: Its time stamp, or None when that is too fresh to stand for the content.
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
    """Removes what killed jobs left half-written in folders that no job writes to now."""
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
