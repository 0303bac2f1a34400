"""Digests of tokenised files, taken from their manifests where those still apply."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from snaketune.common.cli import UserError
from snaketune.common.fingerprints import FingerprintCache
from snaketune.tokenized.manifests import Manifests


def bin_digests(train_folder: str | os.PathLike, names: Sequence[str], cache: FingerprintCache) -> list[str]:
    """Returns the SHA-256 of each `.bin` file.

    Takes the digest from the manifest if the size matches. Reads all other files, once.

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
                expected="every file listed in the data order",
                fix="tokenise the datasets again, or write the data order again",
            )
        found = manifests.of(file)
        known = found is not None and found.file["bin_bytes"] == file.stat().st_size
        digests.append(found.file["bin_sha256"] if known else cache.file(file))
    return digests
