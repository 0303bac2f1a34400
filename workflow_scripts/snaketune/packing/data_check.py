"""The content of tokenised files, by digest: what the tokenisation wrote down, where that still holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from snaketune.common.cli import UserError
from snaketune.common.fingerprints import FingerprintCache
from snaketune.packing.pack_plan import plan_folder, read_plan_manifest
from snaketune.tokenized.manifests import Manifests


def bin_digests(train_folder: str | os.PathLike, names: Sequence[str], cache: FingerprintCache) -> list[str]:
    """Returns the SHA-256 of each `.bin` file.

    It comes from the manifests where the size agrees; other files are read, once.

    Raises:
        UserError: A file is missing.
    """
    folder = Path(train_folder)
    manifests = Manifests()
    digests = []
    for name in names:
        file = (folder / name).resolve()
        if not file.is_file():
            raise UserError(
                f"{folder / name} is missing",
                expected="the files that the data order names",
                fix="tokenise the datasets again, or write the data order again",
            )
        found = manifests.of(file)
        known = found is not None and found.file["bin_bytes"] == file.stat().st_size
        digests.append(found.file["bin_sha256"] if known else cache.file(file))
    return digests


def refuse_other_data(
    plan: str | os.PathLike, cache: FingerprintCache, train_folder: str | os.PathLike | None = None
) -> str:
    """Returns the digest of a plan, after making sure that the `.bin` files are those that it was made from.

    Args:
        plan: The plan folder.
        cache: Remembers the digests of files that no manifest knows.
        train_folder: Where the files lie, if not where the plan says.

    Raises:
        UserError: The content of a file is another now.
    """
    manifest = read_plan_manifest(plan)
    folder = (
        Path(train_folder)
        if train_folder
        else Path(os.path.normpath(plan_folder(plan) / manifest["train_folder"]))
    )
    digests = bin_digests(folder, [file["name"] for file in manifest["files"]], cache)
    for file, digest in zip(manifest["files"], digests, strict=True):
        if digest != file["bin_sha256"]:
            raise UserError(
                f"{folder / file['name']} has changed since {plan} was made",
                found=digest[:12],
                expected=file["bin_sha256"][:12],
                fix="make the plan again with plan_packing.py",
            )
    return manifest["plan_sha256"]
