"""Tells the workflow that a training was refused, so that it does not start the same training again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from snaketune.common.cli import UserError
from snaketune.common.files import write_text


def run_marking_refusal(marker: Path, train: Callable[[], int | None]) -> int | None:
    """Runs `train` and returns its exit code; writes `marker` if the training was refused.

    Refused means exit code 2 or a `UserError`: the user has to change something. Snakemake does not see a job's exit
    code, and on a cluster only the shared files (rules/adapt_snakemake.smk). The ranks write the file too: srun returns
    the code of a task that it killed because another one was refused.
    """
    try:
        code = train()
    except UserError as error:
        _write(marker, str(error))
        raise
    except SystemExit as exit:
        if exit.code == 2:
            _write(marker, "exit code 2")
        raise
    if code == 2:
        _write(marker, "exit code 2; the log of the training has the error")
    return code


def _write(marker: Path, text: str) -> None:
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_text(marker, text + "\n")
