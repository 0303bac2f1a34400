"""Finds the JSONL line that a document came from.

No file stores this. Which lines were left out (held out, moved to the valid folder, quarantined) follows from
their content, the options in the manifest and the quarantine file, so the source is read again and the
choices are repeated. The source digest and the number of documents in the manifest prove that the result is
right.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from snaketune.chat_files.line_choice import is_held_out, is_valid
from snaketune.chat_files.line_reader import LineReader
from snaketune.common.cli import UserError
from snaketune.tokenized.layout import quarantine_path
from snaketune.tokenized.manifests import FileEntry


def source_lines(entry: FileEntry, processed_dir: str | os.PathLike) -> tuple[Path, np.ndarray]:
    """Returns the JSONL file of a `.bin` file and the line of each document, from 1: int64 (documents,).

    Args:
        entry: The manifest entry of the `.bin` file.
        processed_dir: Folder of the JSONL files.

    Raises:
        UserError: The source is missing or changed.
    """
    quarantine = quarantine_path(entry.path.parent.parent, entry.manifest["dataset"], entry.file["bin"])
    source = Path(processed_dir) / entry.file["source"]
    return source, _lines_kept(source, entry.file, entry.manifest["options"], _quarantined(quarantine))


def _lines_kept(source: Path, entry: Mapping, options: Mapping[str, Any], bad: set[int]) -> np.ndarray:
    share, seed = options["heldout_share"], options["heldout_seed"]
    valid_share = options["valid_share"] if options["valid"] == "holdout" else 0
    kept = []
    with LineReader(source) as reader:
        for block in reader:
            for number, line in enumerate(block.lines, block.first_line):
                if (
                    number in bad
                    or is_held_out(line, share, seed)
                    or is_valid(line, valid_share, options["valid_seed"])
                ):
                    continue
                kept.append(number)
    if reader.sha256 != entry["source_sha256"] or len(kept) != entry["samples"]:
        raise UserError(
            f"{source} is not the file that was tokenised",
            found=f"SHA-256 {reader.sha256[:12]}, {len(kept)} lines to train on",
            expected=f"{entry['source_sha256'][:12]}, {entry['samples']}",
            fix="restore the old file, or tokenise the dataset again",
        )
    return np.array(kept, dtype=np.int64)


def _quarantined(path: Path) -> set[int]:
    if not path.is_file():
        return set()
    with open(path, encoding="utf-8") as file:
        return {json.loads(line)["line"] for line in file}
