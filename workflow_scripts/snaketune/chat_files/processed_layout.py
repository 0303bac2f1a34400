"""Finds the chat data. Imports nothing heavy, because the workflow imports it too.

    <processed_dir>/<dataset>/processed/.../<file>.jsonl

As in XTuner 0.2.0, the first folder names the dataset, `processed` may be deeper and may contain folders, and links
are followed. Hidden files and folders are skipped, and so are links to a parent folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from snaketune.common.cli import UserError

_SUFFIX = ".jsonl"
_LAYOUT = "<dataset>/processed/<any folder>/<file>.jsonl"


def find_datasets(processed_dir: str | os.PathLike) -> dict[str, list[Path]]:
    """Returns the JSONL files of each dataset, both sorted by name.

    Raises:
        UserError: The folder is missing or has no dataset, or two files of a dataset have the same name.
    """
    root = Path(processed_dir)
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder",
            expected=f"a folder that contains {_LAYOUT}",
            fix="correct --processed-dir (config: the data's processed_dir)",
        )
    datasets = {}
    for entry in sorted(_visible(root), key=lambda entry: entry.name):
        if _is(entry.is_dir):
            files: list[Path] = []
            _collect(Path(entry.path), False, frozenset({os.path.realpath(root)}), files)
            if files:
                _refuse_same_names(entry.name, files)
                datasets[entry.name] = sorted(files)
    if not datasets:
        hint = (
            "pass the folder above it"
            if (root / "processed").is_dir()
            else "move the JSONL files into this layout"
        )
        raise UserError(
            f"{root} has no dataset", found="no JSONL file in this layout", expected=_LAYOUT, fix=hint
        )
    return datasets


def _visible(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read", found=error.strerror, fix="check its permissions"
        ) from None


def _collect(folder: Path, inside: bool, above: frozenset[str], files: list[Path]) -> None:
    real = os.path.realpath(folder)
    if real in above:
        return
    inside = inside or folder.name == "processed"
    for entry in _visible(folder):
        if _is(entry.is_dir):
            _collect(Path(entry.path), inside, above | {real}, files)
        elif inside and entry.name.endswith(_SUFFIX):
            if not _is(entry.is_file):
                raise UserError(
                    f"{entry.path} cannot be read",
                    found="a broken link, or not a regular file",
                    expected="a file",
                    fix="fix or remove it",
                )
            files.append(Path(entry.path))


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link that leads to itself
        return False


def _refuse_same_names(dataset: str, files: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for file in sorted(files):
        other = seen.setdefault(file.stem, file)
        if other != file:
            raise UserError(
                f"dataset {dataset!r}: two files have the same name and would become one tokenised file",
                found=f"{other} and {file}",
                expected="a different name for each JSONL file of a dataset",
                fix="rename one of them, or move it into another dataset's folder",
            )
