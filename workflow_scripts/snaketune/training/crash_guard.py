"""Keeps a run that crashes at the same step again and again from being started for ever.

guard.json in the run folder says whether an attempt is running and how those before it crashed. An attempt that ends as
it should, finished or with exit code 75, removes it; one that is still marked as running at the next start has crashed.
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
# Attempts in a row that may end at one step. A traceback comes again; without one the process was killed from outside:
# by want of memory, which comes again too, or by a node that failed, for which a third attempt is worth it.
_WITH_TRACEBACK, _WITHOUT = 2, 3
# What gloo and NCCL say to the ranks that miss another one: no cause of its own. The rank may be one of another pod.
_ANOTHER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")


def check_guard(folder: Path, metrics: Path) -> None:
    """Refuses another attempt when the last ones all crashed at one step.

    Args:
        folder: The run folder.
        metrics: Its metrics file, which tells how far the last attempt came.

    Raises:
        UserError: They did.
    """
    crashes = _crashes(folder, metrics)
    attempts = _WITH_TRACEBACK if all(crash["traceback"] for crash in crashes[-2:]) else _WITHOUT
    last = crashes[-attempts:]
    if len(last) < attempts or len({crash["step"] for crash in last}) > 1:
        return
    files = _tracebacks(folder)
    if files:
        cause = f"{files[0].read_text().rstrip().splitlines()[-1]}\n            (all of it in {files[0]})"
    else:
        cause = "no traceback: killed from outside, perhaps for want of memory"
    raise UserError(
        f"the last {attempts} attempts all ended after step {last[0]['step']}, and another one would too",
        found=cause,
        fix=f"mend the cause, then delete {folder / GUARD} or start with --ignore-guard",
    )


def begin_attempt(folder: Path, metrics: Path, step: int) -> None:
    """Marks an attempt as running from `step` on; the metrics are cut back to it after this."""
    write_json(folder / GUARD, {"crashes": _crashes(folder, metrics), "running_from": step})
    forget_tracebacks(folder)


def forget_tracebacks(folder: Path) -> None:
    """Removes the tracebacks of an attempt of which a rank was killed: the others only missed it."""
    for path in _tracebacks(folder):
        path.unlink()


def clear_guard(folder: Path) -> None:
    """Forgets what happened: this attempt ended as it should, or a person says that the cause is mended."""
    (folder / GUARD).unlink(missing_ok=True)


def record_crash(folder: Path, error: BaseException) -> None:
    """Writes the traceback of this rank's end where the next start finds it, unless it only missed another rank."""
    if any(words in str(error) for words in _ANOTHER_IS_GONE):
        return
    text = "".join(traceback.format_exception(error))
    with suppress(OSError, UserError):  # a full disk: the error itself says so
        write_text(folder / f"crash_rank_{os.environ['RANK']}.txt", text)


def _crashes(folder: Path, metrics: Path) -> list[dict]:
    """The crashes since the last attempt that ended as it should: the step that each reached, and if it said why."""
    if not (folder / GUARD).is_file():
        return []
    record = read_json(folder / GUARD)
    reached = max(record["running_from"], last_step(metrics))
    return [*record["crashes"], {"step": reached, "traceback": bool(_tracebacks(folder))}]


def _tracebacks(folder: Path) -> list[Path]:
    """The first to be written first: the other ranks mostly fail because of it."""
    return sorted(folder.glob("crash_rank_*.txt"), key=os.path.getmtime)
