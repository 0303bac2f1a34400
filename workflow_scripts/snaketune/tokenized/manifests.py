"""Makes, finds, reads and checks the manifests of tokenised datasets.

A manifest records the results for each JSONL file of a dataset, and the tokenizer, template and options. It
is written last: a dataset without a manifest is not completely tokenised. Files tokenised by XTuner have
none. tokenized.json represents all manifests of a folder.
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
# The keys that decide the bytes of a `.bin` file, besides its source.
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
    """A manifest's entry for one `.bin` file.

    Attributes:
        path: Path of the manifest.
        manifest: Content of the manifest.
        file: Entry of the file in the manifest.
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
        dataset: The dataset's name.
        identity: See `snaketune.tokenized.identity`.
        files: One entry per JSONL file.
        counts: Counts of the encoder.
        length_histogram: Histogram of the lengths of train documents.
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
        UserError: The file is missing or is not the manifest of a tokenised dataset.
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
        fix="run tokenize_dataset.py again, which rewrites it",
    )


def list_manifests(tokenized_dir: str | os.PathLike) -> list[Path]:
    """Returns the sorted paths of a folder's manifests; an empty list if the folder does not exist."""
    return sorted(manifests_folder(tokenized_dir).glob("*.json"))


class Manifests:
    """Finds the manifests of `.bin` files. Reads each manifest once."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[dict[str, Any], dict[Path, dict[str, Any]]]] = {}

    def of(self, file: str | os.PathLike) -> FileEntry | None:
        """Returns the manifest entry of a `.bin` file; None if there is no manifest or the file is not in it.

        Follows links.

        Raises:
            UserError: The manifest is broken.
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
    """Writes the digest of each dataset's manifest. The index changes only when a manifest does."""
    digests = {name: sha256_json(manifest) for name, manifest in manifests.items()}
    write_json(path, {"format": FORMAT, "datasets": digests})


def read_index(path: str | os.PathLike) -> dict[Path, str]:
    """Returns the manifests listed in a tokenized.json with their digests, sorted by dataset.

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
                expected=f"every manifest listed in {path}",
                fix="tokenise the data again",
            )
    return manifests


def manifest_paths(path: str | os.PathLike) -> list[Path]:
    """Returns the manifests listed in a tokenized.json; the path itself if it is a manifest.

    Raises:
        UserError: A manifest is missing.
    """
    return list(read_index(path)) if "datasets" in read_json(path) else [Path(path)]
