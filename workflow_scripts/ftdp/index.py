"""tokenized.json: the one file that stands for all manifests of a tokenised folder, however many datasets there are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import read_json, sha256_json, write_json
from ftdp.layout import manifest_path


def write_index(path: str | os.PathLike, manifests: dict[str, dict[str, Any]]) -> None:
    """Writes the digest of each dataset's manifest; so it changes when any of them does, and only then."""
    digests = {name: sha256_json(manifest) for name, manifest in manifests.items()}
    write_json(path, {"format": 1, "datasets": digests})


def manifest_paths(path: str | os.PathLike) -> list[Path]:
    """Returns the manifests that a tokenized.json names; the path itself if it is a manifest.

    Raises:
        UserError: A manifest is missing.
    """
    path = Path(path)
    datasets = read_json(path).get("datasets")
    if datasets is None:
        return [path]
    paths = [manifest_path(path.parent, name) for name in sorted(datasets)]
    for each in paths:
        if not each.is_file():
            raise UserError(
                f"{each} is missing",
                expected=f"the manifests that {path} names",
                fix="tokenise the data again",
            )
    return paths
