"""OpenCompass's environment, for tests that run it."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

from environments import REPO, python_of
from warm import WarmParent

# Importing these takes sixteen seconds of processor, and each task of an evaluation is a process of its own.
_LIBRARIES = (
    *("opencompass.cli.main", "opencompass.models", "opencompass.runners", "opencompass.partitioners"),
    *("opencompass.tasks.openicl_infer", "opencompass.tasks.openicl_eval", "opencompass.summarizers"),
    "transformers.models.llama.modeling_llama",
)


def opencompass_python() -> str:
    """The Python of OpenCompass's environment; skips if there is none."""
    return python_of("opencompass", "`make setup-opencompass`")


@functools.cache
def _parent() -> tuple[WarmParent, Path, tempfile.TemporaryDirectory]:
    """Returns the parent of warm commands, and their `sys.executable`, so that the processes they start are warm too."""
    parent, folder = WarmParent(_LIBRARIES, opencompass_python()), tempfile.TemporaryDirectory()
    python = Path(folder.name, "python")
    python.write_text(f'#!/bin/sh\nWARM_EXECUTABLE="$0" exec {parent.client_command()} "$@"\n')
    python.chmod(0o755)
    return parent, python, folder


def run_there(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs a command with OpenCompass's Python, warm (tests/warm.py), and our libraries on its path."""
    parent, python, _ = _parent()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO / "workflow_scripts")}
    return parent.run([*map(str, args)], timeout=900, env=environment, executable=python, cwd=cwd)
