"""Converts input files to one dataset in the processed layout, with a manifest that accounts for every row.

<processed_dir>/<dataset>/processed/sft_chat/<file>.jsonl
<processed_dir>/<dataset>/quarantine/<file>.quarantine.jsonl    only if a row is bad
<processed_dir>/<dataset>/ingest.json                           the manifest, written last
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from snaketune.chat_files.bad_lines import BadLine
from snaketune.chat_files.quarantine import QuarantineFile, quarantine_record, refuse_too_many
from snaketune.chat_format.chat_template import MessageError, refuse_half_characters
from snaketune.chat_format.template_file import load_template
from snaketune.common.cli import UserError
from snaketune.common.files import atomic_dir, sha256_file, write_json
from snaketune.common.progress import Progress
from snaketune.ingest.fields import ConvertOptions
from snaketune.ingest.formats import convert
from snaketune.ingest.rows import Row, RowReader
from snaketune.ingest.sources import find_inputs, output_stem
from snaketune.settings.schema import default_of

FOLDER = "sft_chat"
MANIFEST = "ingest.json"


@dataclass(frozen=True)
class IngestOptions:
    """Options for converting rows.

    Attributes:
        format: A name from `snaketune.ingest.formats.FORMATS`, or "auto" to detect the format of each row.
        arguments_key: See `ConvertOptions`.
        on_bad_sample: "stop" at the first bad row, or "quarantine" it and continue.
        max_bad_share: With "quarantine", fail if a larger share of a file's rows is bad.
    """

    format: str = "auto"
    arguments_key: str = "parameters"
    on_bad_sample: str = default_of("tokenize.on_bad_sample")
    max_bad_share: float = default_of("tokenize.max_bad_share")


def ingest(inputs: list[str], processed_dir: str, dataset: str, options: IngestOptions) -> dict[str, Any]:
    """Writes the dataset completely or not at all. Replaces a dataset that an earlier call wrote.

    Args:
        inputs: Files and folders.
        processed_dir: Parent folder of `<dataset>/`.
        dataset: Name of the dataset.
        options: How to convert the rows.

    Returns:
        The manifest.

    Raises:
        UserError: An input is missing or broken, a row is bad, or the folder has a dataset that ingest did not write.
    """
    if not dataset or dataset.startswith(".") or "/" in dataset or "\0" in dataset:
        raise UserError(
            "the dataset name is not valid as a folder name",
            found=repr(dataset),
            fix="choose a name such as my_data (--dataset)",
        )
    folder = Path(processed_dir) / dataset
    if (folder / "processed").exists() and not (folder / MANIFEST).exists():
        raise UserError(
            f"{folder} holds a dataset that ingest did not write",
            expected=f"no folder {folder}/processed, or {folder / MANIFEST} beside it",
            fix="choose another --dataset, or move the folder away",
        )
    files = find_inputs(inputs)
    for file in files:
        if folder.resolve() in file.resolve().parents:
            raise UserError(f"{file} is in the folder to be written", fix="choose another --dataset")
    # A quarantine explains why the last run stopped, so keep it until the next run.
    shutil.rmtree(folder / "quarantine", ignore_errors=True)
    progress = Progress("bytes", sum(file.stat().st_size for file in files), "rows")
    with atomic_dir(folder / "processed") as target:
        (target / FOLDER).mkdir()
        reports = [_FileJob(file, folder, options, progress).run(target / FOLDER) for file in files]
        # From here on the old manifest is wrong.
        (folder / MANIFEST).unlink(missing_ok=True)
    manifest = {
        "format": 1,
        "dataset": dataset,
        "options": {"format": options.format, "arguments_key": options.arguments_key},
        "files": reports,
        "totals": {key: sum(file[key] for file in reports) for key in ("rows", "samples", "quarantined")},
    }
    write_json(folder / MANIFEST, manifest)
    print(f"ingested {len(files)} files: {progress.finish()}", flush=True)
    return manifest


class _FileJob:
    """Converts one input file."""

    def __init__(self, source: Path, folder: Path, options: IngestOptions, progress: Progress):
        self._source, self._options, self._progress = source, options, progress
        self._quarantine = folder / "quarantine" / f"{output_stem(source)}.quarantine.jsonl"
        self._formats: Counter[str] = Counter()
        self._convert = ConvertOptions(options.arguments_key)
        self._template = load_template("internlm2_chat")

    def run(self, target: Path) -> dict[str, Any]:
        """Writes `<target>/<file>.jsonl` and returns the file's entry in the manifest."""
        output = target / f"{output_stem(self._source)}.jsonl"
        rows = samples = position = 0
        reader = RowReader(self._source)
        with open(output, "wb") as file, QuarantineFile(self._quarantine) as quarantine:
            for row in reader:
                rows += 1
                try:
                    file.write(self._line(row))
                    samples += 1
                except BadLine as error:
                    if self._options.on_bad_sample != "quarantine":
                        raise error.at(f"{self._source}:{row.number}") from None
                    reason = str(error)
                    quarantine.add(quarantine_record(self._source.name, row.number, row.raw, reason))
                self._progress.add(self._source.name, bytes=reader.position - position, rows=1)
                position = reader.position
        refuse_too_many(
            str(self._source), quarantine.count, rows, self._options.max_bad_share, str(self._quarantine)
        )
        if rows != samples + quarantine.count:
            raise AssertionError(f"{self._source}: {rows} rows, {samples} + {quarantine.count} accounted for")
        return {
            "source": self._source.name,
            "source_bytes": self._source.stat().st_size,
            "source_sha256": sha256_file(self._source),
            "output": f"{FOLDER}/{output.name}",
            "output_sha256": sha256_file(output),
            "rows": rows,
            "samples": samples,
            "quarantined": quarantine.count,
            "formats": dict(sorted(self._formats.items())),
        }

    def _line(self, row: Row) -> bytes:
        if isinstance(row.value, BadLine):
            raise row.value
        try:
            name, messages = convert(row.value, self._options.format, self._convert, self._check)
        except MessageError as error:
            # Do not suggest ingest: it is what the user is running.
            raise BadLine.from_message(error) from None
        self._formats[name] += 1
        try:
            return orjson.dumps(messages) + b"\n"
        except TypeError:  # a number that orjson cannot write, under a key that ftdp does not use
            return json.dumps(messages).encode() + b"\n"

    def _check(self, messages: Any) -> None:
        """Rejects conversations that tokenisation with the default template would reject."""
        refuse_half_characters(self._template.turns(messages))
