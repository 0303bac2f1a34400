"""The order of the train files. It decides the row numbers, so a repeatable run needs a repeatable order.

XTuner 0.2.0's `get_data_order.py` tries to sort folders but sorts them after the walk, so its folder order is
the file system's. This module sorts folders before entering them, so the same data gives the same order on
every cluster. It also reads a `data_order.txt` that XTuner wrote.
"""

from __future__ import annotations

import os
from pathlib import Path

from snaketune.common.cli import UserError
from snaketune.common.files import write_text
from snaketune.tokenized.layout import BIN, TEMPLATE_FOLDER


def list_train_files(train_folder: str | os.PathLike, file_type: str = BIN) -> list[str]:
    """Returns the files below `train_folder` that end in `file_type`, as POSIX paths relative to it.

    A folder's files (sorted) come before those of its subfolders (sorted). Follows links, except to a parent
    folder.

    Raises:
        UserError: The folder is missing.
    """
    root = Path(train_folder)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder", fix="tokenise the datasets first (tokenize_dataset.py)")
    found: list[str] = []

    def visit(folder: Path, above: frozenset[str]) -> None:
        real = os.path.realpath(folder)
        if real in above:
            return
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        # A leading dot marks a file that is still being written.
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in entries:
            if entry.is_file() and entry.name.endswith(file_type):
                found.append(Path(entry.path).relative_to(root).as_posix())
        for entry in entries:
            if entry.is_dir():
                visit(Path(entry.path), above | {real})

    visit(root, frozenset())
    return found


def find_train_folder(data_folder: str | os.PathLike) -> Path:
    """Returns the train folder, given the tokenised folder, its template folder or the train folder itself.

    Raises:
        UserError: There is no train folder.
    """
    folder = Path(data_folder)
    for candidate in (folder / TEMPLATE_FOLDER / "train", folder / "train", folder):
        if candidate.name == "train" and candidate.is_dir():
            return candidate
    # The train folder may have a different name (renamed or linked): accept a folder with .bin files and no
    # valid/.
    if folder.is_dir() and not (folder / "valid").is_dir() and list_train_files(folder):
        return folder
    raise UserError(
        f"{folder} has no train folder",
        expected=f"the tokenised folder, or {TEMPLATE_FOLDER}/ or {TEMPLATE_FOLDER}/train/ in it",
        fix="tokenise the datasets first (tokenize_dataset.py), or pass the folder given to its --tokenized-dir",
    )


def write_data_order(
    data_folder: str | os.PathLike, save_path: str | os.PathLike, file_type: str = BIN
) -> list[str]:
    """Writes one path per line, relative to the train folder, and returns the paths.

    Raises:
        UserError: No file matches, or a name has a line break or surrounding spaces.
    """
    train = find_train_folder(data_folder)
    names = list_train_files(train, file_type)
    if not names:
        raise UserError(
            f"{train}: no file ends in {file_type!r}",
            fix="tokenise the datasets first, or correct --file-type",
        )
    for name in names:
        if len(name.splitlines()) != 1 or name != name.strip():
            raise UserError(
                f"{train}: the file name {name!r} cannot be written on one line", fix="rename the JSONL file"
            )
    write_text(save_path, "".join(f"{name}\n" for name in names))
    return names


def read_data_order(path: str | os.PathLike) -> list[str]:
    """Returns the paths of a `data_order.txt`.

    Raises:
        UserError: The file is missing or empty, or lists a file twice (its rows would be trained on twice per
            epoch).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing", fix="write it with write_data_order.py")
    names = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not names:
        raise UserError(f"{path} is empty", fix="write it with write_data_order.py")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise UserError(f"{path} lists a file twice", found=", ".join(twice), fix="remove the second line")
    return names
