"""Versions of Python packages: pinned in a pip lock file, or installed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^\s;]+)")


def read_pins(lock: Path) -> dict[str, str]:
    """Returns {package: version} from a file of `name==version` lines."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    return {match[1]: match[2] for line in lines if (match := _PIN.match(line))}


def installed_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Returns {package: installed version with build tag (`+cpu`), or None if not installed}."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
