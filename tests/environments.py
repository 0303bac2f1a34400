"""Finds the Pythons of environments other than the tests' own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def python_of(environment: str, made_by: str) -> str:
    """Returns the Python of `.venv-<environment>`, or $SNAKETUNE_<ENVIRONMENT>_PYTHON; skips if missing."""
    variable = f"SNAKETUNE_{environment.upper()}_PYTHON"
    named = os.environ.get(variable)
    path = Path(named) if named else REPO / f".venv-{environment}" / "bin" / "python"
    if not path.is_file():
        pytest.skip(f"no {environment} environment at {path} (run {made_by}, or set {variable})")
    return str(path)
