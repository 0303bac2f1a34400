"""Stops restarting a run that keeps crashing at the same step.

guard.json in the run folder records whether an attempt is running and how earlier attempts crashed. An
attempt that finishes or exits with code 75 removes it. An attempt still marked as running at the next start
has crashed.
"""

from __future__ import annotations

import os
import traceback
from contextlib import suppress
from pathlib import Path

from snaketune.common.cli import UserError
from snaketune.common.files import read_json, write_json, write_text
from snaketune.training.metrics_file import last_step

GUARD = "guard.json"
# Attempts in a row that may end at the same step. An exception will recur. Without a traceback, something
# killed the process: running out of memory, which also recurs, or a node failure, which justifies a third
# attempt.
_WITH_TRACEBACK, _WITHOUT = 2, 3
# Errors from gloo and NCCL on ranks that lost another rank, perhaps in another pod: not the cause.
_ANOTHER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")


def check_guard(folder: Path, metrics: Path) -> None:
    """Refuses another attempt if the last ones all crashed at the same step.

    Args:
        folder: The run folder.
        metrics: Its metrics file, which shows how far the last attempt got.

    Raises:
        UserError: The last attempts all crashed at the same step.
    """
    crashes = _crashes(folder, metrics)
    attempts = _WITH_TRACEBACK if all(crash["traceback"] for crash in crashes[-2:]) else _WITHOUT
    last = crashes[-attempts:]
    if len(last) < attempts or len({crash["step"] for crash in last}) > 1:
        return
    files = _tracebacks(folder)
    if files:
        cause = f"{files[0].read_text().rstrip().splitlines()[-1]}\n            (traceback in {files[0]})"
    else:
        cause = "no traceback: killed from outside, perhaps out of memory"
    raise UserError(
        f"the last {attempts} attempts all ended after step {last[0]['step']}; another attempt would too",
        found=cause,
        fix=f"fix the cause, then delete {folder / GUARD} or start with --ignore-guard",
    )


def begin_attempt(folder: Path, metrics: Path, step: int) -> None:
    """Marks an attempt as running from `step`. Call it before cutting the metrics back to that step."""
    write_json(folder / GUARD, {"crashes": _crashes(folder, metrics), "running_from": step})
    forget_tracebacks(folder)


def forget_tracebacks(folder: Path) -> None:
    """Removes the tracebacks of an attempt in which a rank was killed: the other ranks only lost it."""
    for path in _tracebacks(folder):
        path.unlink()


def clear_guard(folder: Path) -> None:
    """Removes the record of crashes: this attempt ended well, or the user says that the cause is fixed."""
    (folder / GUARD).unlink(missing_ok=True)


def record_crash(folder: Path, error: BaseException) -> None:
    """Writes this rank's traceback to the run folder, unless the rank only lost another rank."""
    if any(words in str(error) for words in _ANOTHER_IS_GONE):
        return
    text = "".join(traceback.format_exception(error))
    with suppress(OSError, UserError):  # the disk may be full; the original error is raised anyway
        write_text(folder / f"crash_rank_{os.environ['RANK']}.txt", text)


def _crashes(folder: Path, metrics: Path) -> list[dict]:
    """Returns the crashes since an attempt last ended well: step reached, and True with a traceback."""
    if not (folder / GUARD).is_file():
        return []
    record = read_json(folder / GUARD)
    reached = max(record["running_from"], last_step(metrics))
    return [*record["crashes"], {"step": reached, "traceback": bool(_tracebacks(folder))}]


def _tracebacks(folder: Path) -> list[Path]:
    """Returns the traceback files, oldest first: the first failure usually causes the others."""
    return sorted(folder.glob("crash_rank_*.txt"), key=os.path.getmtime)
