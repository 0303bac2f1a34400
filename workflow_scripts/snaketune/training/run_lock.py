"""The lock of a run folder: records which process, host and Slurm job trains there, and detects stale locks.

`flock` is not enough: on many cluster file systems it works on one node only, and it does not identify the
owner. This lock is a file that only one process can create (`link` is atomic on NFS too). Its owner touches
it every few seconds.
"""

from __future__ import annotations

import getpass
import os
import platform
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from snaketune.common.files import read_json, write_json
from snaketune.training.early_stop import EXIT_RESUME

LOCK = "lock.json"
BEAT = 10.0  # seconds between heartbeats
# Seconds without a heartbeat after which the lock of another host is stale. NFS shows times up to 60 s late.
STALE = 120.0
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED"}


class RunLock:
    """The lock of a run folder, taken by this process until it ends or calls `release`.

    Raises:
        LockTaken: Another running trainer has taken it.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOCK
        self._owner = {
            "user": getpass.getuser(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "token": uuid.uuid4().hex,
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **_this_process(),
        }
        owner = read_owner(folder)
        if owner is not None:
            if is_alive(folder, owner):
                raise LockTaken(owner)
            self._remove(owner)
        temporary = folder / f".{LOCK}.{self._owner['token']}"
        write_json(temporary, self._owner)
        try:
            os.link(temporary, self._path)
        except FileExistsError:
            raise LockTaken(read_owner(folder) or {}) from None
        finally:
            temporary.unlink()
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Releases the lock for the next trainer."""
        self._released.set()
        if (read_owner(self._path.parent) or {}).get("token") == self._owner["token"]:
            self._path.unlink()

    def _remove(self, stale: dict[str, Any]) -> None:
        """Removes a stale lock, unless another trainer has already replaced it with a new one."""
        aside = self._path.with_name(f".{LOCK}.stale.{self._owner['token']}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        if read_json(aside)["token"] != stale["token"]:
            aside.rename(self._path)
            raise LockTaken(read_owner(self._path.parent) or {})
        aside.unlink()

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            owner = read_owner(self._path.parent)
            if owner is not None and owner["token"] == self._owner["token"]:
                os.utime(self._path)
            elif not self._released.is_set():
                # The lock went stale while this process was stopped. Two trainers must not write here.
                print(f"error: {self._path} no longer belongs to this trainer; exiting", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)


class LockTaken(Exception):
    """Another trainer has taken the lock.

    Args:
        owner: Content of the lock file.
    """

    def __init__(self, owner: dict[str, Any]):
        job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
        super().__init__(
            f"process {owner.get('pid')} of {owner.get('user')} on {owner.get('host')}{job}, since {owner.get('since')}"
        )
        self.owner = owner


def read_owner(folder: Path) -> dict[str, Any] | None:
    """Returns the content of a run folder's lock, or None if there is none."""
    try:
        return read_json(folder / LOCK)
    except FileNotFoundError:
        return None


def is_alive(folder: Path, owner: dict[str, Any]) -> bool:
    """True if the trainer that owns a lock is still running.

    Checks the process if it is on this host. Otherwise asks Slurm whether its job is running. If Slurm does
    not know, or lost the node, the trainer counts as running as long as its heartbeats arrive.
    """
    here = _this_process(owner["pid"])
    if owner["host"] == here["host"]:
        return owner["boot"] == here["boot"] and owner["started"] == here["started"]
    # A job has one trainer: an owner with our own job ID dates from before the job was requeued.
    if owner["slurm_job"] not in (None, os.environ.get("SLURM_JOB_ID")):
        state = ask_slurm("squeue", "-h", "-j", owner["slurm_job"], "-t", "all", "-o", "%T")
        if state in _RUNNING or state in _ENDED:
            return state in _RUNNING
    now = folder / f".now.{uuid.uuid4().hex}"  # the file server's clock, not ours
    now.touch()
    try:
        return now.stat().st_mtime - (folder / LOCK).stat().st_mtime < STALE
    except FileNotFoundError:
        return False
    finally:
        now.unlink()


def wait_until_free(folder: Path, deadline: float) -> bool:
    """Waits until no other trainer is running in a run folder. Returns True if there was one.

    Args:
        folder: The run folder.
        deadline: When to stop waiting, in seconds since 1970.

    Raises:
        SystemExit: The deadline passed. The exit code asks for another attempt.
    """
    waited = False
    while (owner := read_owner(folder)) is not None and is_alive(folder, owner):
        if not waited:
            print(
                f"Another trainer is running in {folder}: {LockTaken(owner)}. Waiting for it to end.",
                flush=True,
            )
            waited = True
        if time.time() > deadline:
            print(
                "It is still running, but the time limit or --lock-wait is over; start again to wait.",
                flush=True,
            )
            raise SystemExit(EXIT_RESUME)
        time.sleep(2)
    return waited


def ask_slurm(*command: str) -> str:
    """Returns the output of a Slurm command, or an empty string if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _this_process(pid: int | None = None) -> dict[str, Any]:
    """Identifies a process (by default this one): host, boot, PID, and start time, because PIDs are reused."""
    pid = pid or os.getpid()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = None if fields[0] == "Z" else fields[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        started = boot = None
    return {"host": platform.node(), "boot": boot, "pid": pid, "started": started}
