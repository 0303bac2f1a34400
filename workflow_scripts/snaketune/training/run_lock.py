"""The lock of a run folder: who trains there, on which host and in which Slurm job, and whether that trainer still lives.

`flock` alone does not do: on many cluster file systems it holds on one node only, and it does not say who holds it. The
lock is a file that only one process can make (`link` is atomic on NFS too); its owner touches it every few seconds.
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
from snaketune.training.early_stop import EXIT_GO_ON

LOCK = "lock.json"
BEAT = 10.0  # seconds between two signs of life
STALE = 120.0  # seconds without one after which an owner on another host is given up; NFS shows times up to 60 s late
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED"}


class RunLock:
    """The lock of a run folder, held by this process until it ends or calls `release`.

    Raises:
        LockTaken: Another trainer holds it and lives.
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
        """Lets the next trainer in."""
        self._released.set()
        if (read_owner(self._path.parent) or {}).get("token") == self._owner["token"]:
            self._path.unlink()

    def _remove(self, stale: dict[str, Any]) -> None:
        """Takes a stale lock away, but not the lock of one who was quicker and has done so already."""
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
                # Given up for dead (this process was stopped for long): two must not write here.
                print(f"error: {self._path} is no longer this trainer's; it ends", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)


class LockTaken(Exception):
    """Another trainer holds the lock. Args: owner: what its file says."""

    def __init__(self, owner: dict[str, Any]):
        job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
        super().__init__(
            f"process {owner.get('pid')} of {owner.get('user')} on {owner.get('host')}{job}, since {owner.get('since')}"
        )
        self.owner = owner


def read_owner(folder: Path) -> dict[str, Any] | None:
    """Returns what the lock of a run folder says, or None without one."""
    try:
        return read_json(folder / LOCK)
    except FileNotFoundError:
        return None


def is_alive(folder: Path, owner: dict[str, Any]) -> bool:
    """Tells whether the trainer that a lock names still lives.

    On this host its process is looked at. Elsewhere Slurm says whether its job still runs; where Slurm does not know, or
    lost the node, the trainer lives as long as it gives signs of life.
    """
    here = _this_process(owner["pid"])
    if owner["host"] == here["host"]:
        return owner["boot"] == here["boot"] and owner["started"] == here["started"]
    # A job has one trainer: one of this same job is what was there before the job was requeued.
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
    """Waits until no other trainer works in a run folder; tells whether there was one.

    Args:
        folder: The run folder.
        deadline: When to give it up, in seconds since 1970.

    Raises:
        SystemExit: Given up; the code asks for another attempt.
    """
    told = False
    while (owner := read_owner(folder)) is not None and is_alive(folder, owner):
        if not told:
            print(f"Another trainer works in {folder}: {LockTaken(owner)}. Waiting for it.", flush=True)
            told = True
        if time.time() > deadline:
            print(
                "It goes on, and this one may not wait longer (its time limit, or --lock-wait); start again to wait.",
                flush=True,
            )
            raise SystemExit(EXIT_GO_ON)
        time.sleep(2)
    return told


def ask_slurm(*command: str) -> str:
    """Returns what one of Slurm's commands prints, empty when it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _this_process(pid: int | None = None) -> dict[str, Any]:
    """Host, its boot, and the start of a process (this one by default), which tells it from a later one of its number."""
    pid = pid or os.getpid()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = None if fields[0] == "Z" else fields[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        started = boot = None
    return {"host": platform.node(), "boot": boot, "pid": pid, "started": started}
