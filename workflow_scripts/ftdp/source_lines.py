"""Finds the line of the JSONL file that a tokenised sample came from.

Nothing writes it down: which lines were left out (held out, moved to the valid folder, quarantined) follows from their
content, the options in the manifest and the quarantine file, so the source is read again with the same choices. The
manifest's digest of the source and its number of samples prove that the result is right.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import UserError
from ftdp.layout import manifest_path
from ftdp.line_choice import is_held_out, is_valid
from ftdp.reading import LineReader


def source_lines(
    tokenized_dir: str | os.PathLike, dataset: str, bin_name: str, processed_dir: str | os.PathLike
) -> tuple[Path, np.ndarray]:
    """Returns the JSONL file of a `.bin` file, and the line of each of its samples, from 1: int64 (samples,).

    Args:
        tokenized_dir: The folder that holds `manifests/`.
        dataset: Name of the dataset.
        bin_name: Name of the `.bin` file.
        processed_dir: The folder of the JSONL files.

    Raises:
        UserError: The manifest or the source is missing, or the source is not what was tokenised.
    """
    path = manifest_path(tokenized_dir, dataset)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", found=error, fix="tokenise the dataset again") from None
    entry = next((file for file in manifest["files"] if Path(file["bin"]).name == bin_name), None)
    if entry is None:
        raise UserError(f"{path} does not know {bin_name}", fix="tokenise the dataset again")
    quarantine = path.with_suffix("") / f"{bin_name.removesuffix('.bin')}.quarantine.jsonl"
    source = Path(processed_dir) / entry["source"]
    return source, _lines_kept(source, entry, manifest["options"], _quarantined(quarantine))


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
            fix="put the old file back, or tokenise the dataset again",
        )
    return np.array(kept, dtype=np.int64)


def _quarantined(path: Path) -> set[int]:
    if not path.is_file():
        return set()
    with open(path, encoding="utf-8") as file:
        return {json.loads(line)["line"] for line in file}
