"""What lineage is made of: records, and digests that can be computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snaketune.common.files import sha256_file


@dataclass(frozen=True)
class Check:
    """A digest that was written down, and how to compute it again.

    Attributes:
        what: The file, or what the digest is about.
        recorded: SHA-256.
        compute: Computes it; raises an OSError where a file has gone.
    """

    what: str
    recorded: str
    compute: Callable[[], str]


@dataclass
class Record:
    """One step of the way: what it is, what is known of it, and what it was made from."""

    title: str
    path: Path | None = None
    facts: list[tuple[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    sources: list[Record] = field(default_factory=list)


def file_check(path: Path, digest: str) -> Check:
    """Returns the check that a file has the digest that was written down."""
    return Check(str(path), digest, lambda: sha256_file(path))


def slurm_job(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the fact which job wrote a manifest or an evaluation, if one did."""
    return [("Slurm job", record["slurm_job_id"])] if "slurm_job_id" in record else []


def joined(versions: dict[str, Any]) -> str:
    """Returns names and versions as one text."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
