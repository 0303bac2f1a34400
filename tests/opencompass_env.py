"""OpenCompass's environment, for tests that run it."""

from __future__ import annotations

import os
import subprocess

from environments import REPO, python_of


def opencompass_python() -> str:
    """The Python of OpenCompass's environment; skips if there is none."""
    return python_of("opencompass", "`make setup-opencompass`")


def run_there(*args: object, **kwargs) -> subprocess.CompletedProcess:
    """Runs a command with OpenCompass's Python and our libraries on its path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO / "workflow_scripts")}
    return subprocess.run(
        [opencompass_python(), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
        **kwargs,
    )
