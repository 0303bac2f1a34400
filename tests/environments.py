"""The Pythons of the environments beside the tests' own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def python_of(environment: str, made_by: str) -> str:
    """The Python of `.venv-<environment>`, or the one that SNAKETUNE_<ENVIRONMENT>_PYTHON names; skips without it."""
    variable = f"SNAKETUNE_{environment.upper()}_PYTHON"
    named = os.environ.get(variable)
    path = Path(named) if named else REPO / f".venv-{environment}" / "bin" / "python"
    if not path.is_file():
        pytest.skip(f"no {environment} environment at {path} ({made_by} makes it; {variable} names another)")
    return str(path)
