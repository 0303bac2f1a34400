"""The parts of a lineage: records, and digests that can be recomputed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snaketune.common.files import sha256_file


@dataclass(frozen=True)
class Check:
    """A recorded digest and how to recompute it.

    Attributes:
        what: The file, or a description of what the digest covers.
        recorded: The recorded SHA-256.
        compute: Recomputes the digest; raises an OSError if a file is gone.
    """

    what: str
    recorded: str
    compute: Callable[[], str]


@dataclass
class Record:
    """A step in a lineage: its title, facts, checks, and the records it was made from."""

    title: str
    path: Path | None = None
    facts: list[tuple[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    sources: list[Record] = field(default_factory=list)


def file_check(path: Path, digest: str) -> Check:
    """Returns the check that a file has its recorded digest."""
    return Check(str(path), digest, lambda: sha256_file(path))


def slurm_job(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the Slurm job that wrote a manifest or evaluation as a fact; empty if there was none."""
    return [("Slurm job", record["slurm_job_id"])] if "slurm_job_id" in record else []


def joined(versions: dict[str, Any]) -> str:
    """Joins names and versions into one string."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
