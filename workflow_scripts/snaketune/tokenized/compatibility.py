"""Checks that training uses the tokenizer, template and options that the data were tokenised with.

The manifests record these. Files tokenised by XTuner have no manifests and are accepted unchecked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snaketune.chat_format.template_file import TEMPLATE_FILE
from snaketune.common.cli import UserError
from snaketune.encoding.tokenizer import template_record
from snaketune.tokenized.layout import (
    dataset_of,
    manifest_path,
    manifests_folder,
    records_folder,
    tokenized_dir_of,
)
from snaketune.tokenized.manifests import MADE_WITH, FileEntry, Manifests

UNKNOWN = "no manifests (tokenised by XTuner?), so its tokenizer and template are unknown"
_AGAIN = (
    "tokenise again with one tokenizer and the same options (tokenize_dataset.py redoes only what differs)"
)


def made_with(train_folder: str | os.PathLike, names: Sequence[str]) -> dict[str, Any] | None:
    """Returns the digests of tokenizer and template and the options that all these files were made with.

    Args:
        train_folder: `<tokenized-dir>/chatml_llamav13_32k/train`.
        names: The `.bin` files, relative to `train_folder`.

    Returns:
        The common values, as JSON; None if no file has a manifest.

    Raises:
        UserError: A file does not match its manifest, or only some files have one (tokenisation is not
            finished), or two files were made differently.
    """
    manifests = Manifests()
    first: tuple[Path, dict[str, Any] | None] | None = None
    for name in names:
        file = Path(train_folder) / name
        found = manifests.of(file)
        _refuse_unfinished(file, found)
        made = found and {key: found.manifest.get(key) for key in MADE_WITH}
        if first is None:
            first = file, made
        elif made != first[1]:
            what, (one, other) = _difference(first[1], made)
            raise UserError(
                f"{file} was not tokenised like {first[0]}",
                found=f"{what}: {other}",
                expected=one,
                fix=_AGAIN,
            )
    return first and first[1]


def refuse_other_tokenizer(
    what: str | os.PathLike, made: Mapping[str, Any] | None, folder: str | os.PathLike, sha256: str
) -> None:
    """Checks that tokenised files were made with this tokenizer.

    Args:
        what: The files, for the message.
        made: The result of `made_with`; None (unknown) passes.
        folder: The tokenizer's folder.
        sha256: Digest of its tokenizer.json.

    Raises:
        UserError: They were made with a different tokenizer.
    """
    if made is not None and sha256 != made["tokenizer_sha256"]:
        raise UserError(
            f"{what} was made with a different tokenizer",
            found=f"{Path(folder) / 'tokenizer.json'}, SHA-256 {sha256[:12]}",
            expected=f"SHA-256 {made['tokenizer_sha256'][:12]}, as recorded in the manifest",
            fix="set the tokenizer's path to the folder that the data were tokenised with, "
            f"or tokenise again with `tokenize_dataset.py --tokenizer-path {folder}`",
        )


def refuse_other_template(
    what: str | os.PathLike, made: Mapping[str, Any] | None, folder: str | os.PathLike
) -> None:
    """Checks that tokenised files were made with the chat template saved with the tokenizer.

    Args and errors: see `refuse_other_tokenizer`.
    """
    saved = template_record(Path(folder))
    if made and saved and saved["sha256"] != made["template_sha256"]:
        raise UserError(
            f"{what} was made with a different chat template than the one saved with the tokenizer",
            found=f"{saved['name']} ({saved['sha256'][:12]}) in {folder}",
            expected=f"{made['options']['template']} ({made['template_sha256'][:12]}), as recorded in the manifest",
            fix=f"tokenise again with `tokenize_dataset.py --template {Path(folder) / TEMPLATE_FILE}`, "
            "or train with a tokenizer that extend_tokenizer.py wrote for the template of the data",
        )


def _refuse_unfinished(file: Path, found: FileEntry | None) -> None:
    if found is None:
        root = tokenized_dir_of(file.resolve())
        if root and (manifests_folder(root).is_dir() or records_folder(root).is_dir()):
            path = manifest_path(root, dataset_of(file.resolve()))
            raise UserError(
                f"{file} is not in any manifest: its dataset is not completely tokenised, or another tool made it",
                found=f"{path} does not list it" if path.is_file() else "the manifest is missing",
                expected=f"{path}, which is written last and lists the file",
                fix="run tokenize_dataset.py again to tokenise the rest; keep other tools' files in a separate folder",
            )
    elif file.is_file() and file.stat().st_size != found.file["bin_bytes"]:
        raise UserError(
            f"{file} is not the file that was tokenised",
            found=f"{file.stat().st_size} bytes",
            expected=f"{found.file['bin_bytes']} bytes, as recorded in {found.path}",
            fix="run tokenize_dataset.py again, which recreates the file",
        )


def _difference(
    one: Mapping[str, Any] | None, other: Mapping[str, Any] | None
) -> tuple[str, tuple[Any, Any]]:
    """Returns the first setting that differs between two files, and its two values."""
    if one is None or other is None:
        return "manifest", ("none" if one is None else "present", "none" if other is None else "present")
    for key in MADE_WITH[:-1]:
        if one[key] != other[key]:
            return key, (str(one[key])[:12], str(other[key])[:12])
    left, right = one["options"] or {}, other["options"] or {}
    key = next(key for key in (left | right) if left.get(key) != right.get(key))
    return f"option {key}", (left.get(key), right.get(key))
