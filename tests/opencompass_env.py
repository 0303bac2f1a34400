"""OpenCompass's environment, for the tests that run it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def opencompass_python() -> str:
    """The Python of OpenCompass's environment; skips where there is none."""
    named = os.environ.get("SNAKETUNE_OPENCOMPASS_PYTHON")
    path = Path(named) if named else REPO / ".venv-opencompass" / "bin" / "python"
    if not path.is_file():
        pytest.skip(
            f"no OpenCompass environment at {path} (`make setup-opencompass` makes it, `make test` too)"
        )
    return str(path)


def run_there(*args: object, **kwargs) -> subprocess.CompletedProcess:
    """Runs a command of OpenCompass's Python, with our libraries on its path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO / "workflow_scripts")}
    return subprocess.run(
        [opencompass_python(), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
        **kwargs,
    )
