"""Manifests of tokenised datasets: the one place that makes, finds, reads and checks them.

A manifest says what became of each JSONL file of a dataset, and with which tokenizer, template and options. It is written
last: a dataset without one is not tokenised to the end. Files that XTuner tokenised have none. tokenized.json stands for
all manifests of a folder, however many datasets there are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from snaketune.common.cli import UserError
from snaketune.common.files import read_json, sha256_json, write_json
from snaketune.tokenized.layout import dataset_of, manifest_path, manifests_folder, tokenized_dir_of

FORMAT = 1
# What the bytes of a `.bin` file follow from, besides its source.
MADE_WITH = ("tokenizer_sha256", "template_sha256", "tokenized_format", "options")
_SUMS = (
    "source_bytes",
    "bin_bytes",
    "lines",
    "samples",
    "valid_samples",
    "heldout",
    "quarantined",
    "tokens",
    "trained_tokens",
    "truncated",
)


class FileEntry(NamedTuple):
    """What a manifest says of one `.bin` file.

    Attributes:
        path: The manifest.
        manifest: Its content.
        file: The entry of the file in it.
    """

    path: Path
    manifest: Mapping[str, Any]
    file: Mapping[str, Any]


def build_manifest(
    dataset: str,
    identity: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
    counts: Mapping[str, int],
    length_histogram: Mapping[str, list[int]],
) -> dict[str, Any]:
    """Returns the manifest of a dataset.

    Args:
        dataset: Its name.
        identity: What decides the bytes, see `snaketune.tokenized.identity`.
        files: An entry for each JSONL file.
        counts: What the encoder counted.
        length_histogram: Of the train samples.
    """
    totals: dict[str, Any] = {key: sum(file[key] for file in files) for key in _SUMS}
    totals["longest"] = max(file["longest"] for file in files)
    return {
        "format": FORMAT,
        "dataset": dataset,
        "tokenizer_sha256": identity["tokenizer_sha256"],
        "template_sha256": identity["template_sha256"],
        "tokenized_format": identity["format"],
        "options": identity["options"],
        "files": files,
        "totals": totals,
        "counts": counts,
        "length_histogram": length_histogram,
        "trained_share": totals["trained_tokens"] / totals["tokens"] if totals["tokens"] else 0.0,
    }


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a manifest.

    Raises:
        UserError: It is missing, or is not the manifest of a tokenised dataset.
    """
    found = "no such file"
    try:
        manifest = read_json(path)
        if manifest["format"] == FORMAT and {"dataset", "files"} <= manifest.keys():
            return manifest
        found = f"format {manifest['format']}"
    except OSError as error:
        found = error.strerror
    except (ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise UserError(
        f"{path} is not the manifest of a tokenised dataset",
        found=found,
        expected=f"JSON of format {FORMAT}, written by tokenize_dataset.py",
        fix="run tokenize_dataset.py again, which writes it anew",
    )


def list_manifests(tokenized_dir: str | os.PathLike) -> list[Path]:
    """Returns the paths of a folder's manifests, sorted; none where there is no such folder."""
    return sorted(manifests_folder(tokenized_dir).glob("*.json"))


class Manifests:
    """Finds the manifests of `.bin` files, and reads each once."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[dict[str, Any], dict[Path, dict[str, Any]]]] = {}

    def of(self, file: str | os.PathLike) -> FileEntry | None:
        """Returns what the manifest of its dataset says of a `.bin` file; None if there is none, or it says nothing.

        Links are followed.

        Raises:
            UserError: There is a file in the manifest's place, but it is none.
        """
        file = Path(file).resolve()
        root = tokenized_dir_of(file)
        if root is None or not (path := manifest_path(root, dataset_of(file))).is_file():
            return None
        if path not in self._known:
            manifest = read_manifest(path)
            self._known[path] = manifest, {(root / each["bin"]).resolve(): each for each in manifest["files"]}
        manifest, entries = self._known[path]
        return FileEntry(path, manifest, entries[file]) if file in entries else None


def write_index(path: str | os.PathLike, manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the digest of each dataset's manifest; so it changes when any of them does, and only then."""
    digests = {name: sha256_json(manifest) for name, manifest in manifests.items()}
    write_json(path, {"format": FORMAT, "datasets": digests})


def read_index(path: str | os.PathLike) -> dict[Path, str]:
    """Returns the manifests that a tokenized.json names, with their digests, sorted by dataset.

    Raises:
        UserError: A manifest is missing.
    """
    path = Path(path)
    datasets = read_json(path)["datasets"]
    manifests = {manifest_path(path.parent, name): datasets[name] for name in sorted(datasets)}
    for each in manifests:
        if not each.is_file():
            raise UserError(
                f"{each} is missing",
                expected=f"the manifests that {path} names",
                fix="tokenise the data again",
            )
    return manifests


def manifest_paths(path: str | os.PathLike) -> list[Path]:
    """Returns the manifests that a tokenized.json names; the path itself if it is a manifest.

    Raises:
        UserError: A manifest is missing.
    """
    return list(read_index(path)) if "datasets" in read_json(path) else [Path(path)]
