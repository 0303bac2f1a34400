"""Checks that tokenised files are still those that a pack plan was made from."""

from __future__ import annotations

import os
from pathlib import Path

from snaketune.common.cli import UserError
from snaketune.common.fingerprints import FingerprintCache
from snaketune.packing.pack_plan import plan_folder, read_plan_manifest
from snaketune.tokenized.bin_digests import bin_digests


def refuse_other_data(
    plan: str | os.PathLike, cache: FingerprintCache, train_folder: str | os.PathLike | None = None
) -> str:
    """Checks that the `.bin` files are the ones a plan was made from, and returns the plan's digest.

    Args:
        plan: The plan folder.
        cache: Remembers the digests of files that are in no manifest.
        train_folder: The folder of the files, if not the one recorded in the plan.

    Raises:
        UserError: The content of a file changed.
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
