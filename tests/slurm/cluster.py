"""A real Slurm cluster on this machine, for tests and for trying things out: munged, slurmctld and a slurmd a node.

    python tests/slurm/cluster.py up FOLDER      starts it and prints how to use it
    python tests/slurm/cluster.py down FOLDER    stops it

Needs Debian's slurmctld, slurmd, slurm-client and munge, and no configuration of the system: key, sockets, spool and
logs are in FOLDER. All nodes are this host under other ports. Runs as any user, as root too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "sacct", "sacctmgr", "salloc")

_CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerNode=1000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
SlurmctldTimeout=30
MessageTimeout=30
InactiveLimit=0
KillWait=10
MinJobAge=1200
MaxJobCount=20000
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=UNLIMITED State=UP PriorityTier=1
PartitionName=long Nodes=ALL Default=NO MaxTime=UNLIMITED State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL Default=NO MaxTime=UNLIMITED State=UP PriorityTier=10
"""


def missing_programs() -> list[str]:
    """Returns the daemons and commands that are not installed."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [name for name in (*PROGRAMS, "sbatch", "squeue") if shutil.which(name, path=path) is None]


class SlurmCluster:
    """A cluster whose files, daemons included, belong to one folder.

    Args:
        folder: Where it lives; made if missing. A short path: a socket's path has a limit of about 100 characters.
        nodes: Number of nodes, n1 to nN.
        cpus: Processors that each node says it has, whatever the host has.
        memory_mb: Memory that each node says it has.
    """

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 4, memory_mb: int = 64000):
        self.folder = folder.resolve()
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._cpus, self._memory_mb = cpus, memory_mb
        self._pids = self.folder / "pids.json"

    @property
    def environment(self) -> dict[str, str]:
        """Environment in which Slurm's commands talk to this cluster: a folder of wrappers comes first on PATH."""
        return {**os.environ, "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def start(self) -> None:
        """Writes the configuration and starts every daemon; returns when all nodes are idle."""
        for name in ("state", "spool", "log", "bin"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._configure()
        self._pids.write_text("{}")
        self._run_daemon(
            "munged",
            *("--foreground", "--force", "--key-file", self.folder / "munge.key"),
            *("--socket", self.folder / "munge.socket", "--pid-file", self.folder / "munged.pid"),
            *("--log-file", self.folder / "log/munged.log", "--seed-file", self.folder / "munged.seed"),
        )
        _wait(lambda: (self.folder / "munge.socket").exists(), "munged's socket", 10)
        self.start_slurmctld()
        for node in self.nodes:
            self.start_node(node)
        self.wait_until_idle()

    def is_up(self) -> bool:
        """Tells whether the cluster of this folder answers."""
        conf, ping = self.folder / "slurm.conf", ("scontrol", "ping")
        return conf.is_file() and self.run(*ping, check=False).returncode == 0

    def wait_until_idle(self) -> None:
        """Waits until all nodes are up and nothing runs on them."""
        _wait(self._all_idle, "idle nodes", 60)

    def run(self, *command: object, check: bool = True, **options) -> subprocess.CompletedProcess:
        """Runs a command that talks to this cluster, and returns what it did and said."""
        return subprocess.run(
            list(map(str, command)),
            env=self.environment,
            capture_output=True,
            text=True,
            check=check,
            timeout=120,
            **options,
        )

    def stop(self) -> None:
        """Cancels all jobs and stops every daemon."""
        pids = self._read_pids()
        if "slurmctld" in pids:
            self.run("scancel", "--user", str(os.getuid()), check=False)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self.run("squeue", "-h", check=False).stdout.strip():
                time.sleep(0.3)
        for pid in pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for name in pids:
            self._end(name)

    def fail_node(self, node: str, job: str) -> None:
        """Kills a node's slurmd and everything that a job, which has no other node, runs on it."""
        self._end(node, signal.SIGKILL)
        for path in Path("/proc").glob("[0-9]*"):
            try:
                of_job = f"SLURM_JOB_ID={job}\0".encode() in (path / "environ").read_bytes() + b"\0"
                of_job |= (path / "cmdline").read_bytes().startswith(f"slurmstepd: [{job}.".encode())
                if of_job:
                    os.kill(int(path.name), signal.SIGKILL)
            except OSError:
                continue

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._run_daemon("slurmd", "-D", "-N", node, "-f", self.folder / "slurm.conf", key=node)

    def start_slurmctld(self) -> None:
        """Starts the controller daemon."""
        self._run_daemon("slurmctld", "-D", "-f", self.folder / "slurm.conf")

    def stop_slurmctld(self) -> None:
        """Ends the controller daemon as an administrator does."""
        self._end("slurmctld")

    def _configure(self) -> None:
        key = self.folder / "munge.key"
        if not key.exists():
            key.write_bytes(os.urandom(128))
            key.chmod(0o400)
        host, ports = socket.gethostname().split(".")[0], _free_ports(len(self.nodes) + 1)
        nodes = "\n".join(
            f"NodeName={node} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs={self._cpus} "
            f"RealMemory={self._memory_mb} Feature=local State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        values = {"host": host, "port": ports[0], "user": user, "folder": self.folder, "nodes": nodes}
        (self.folder / "slurm.conf").write_text(_CONF.format(**values))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        # A job step strips SLURM_*, SLURM_CONF among them: the commands must find the cluster by themselves.
        path = [part for part in os.environ["PATH"].split(os.pathsep) if not _is_wrappers(Path(part))]
        for name in CLIENTS:
            real = shutil.which(name, path=os.pathsep.join(path))
            if real:
                wrapper = self.folder / "bin" / name
                wrapper.write_text(
                    f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {real} "$@"\n', encoding="utf-8"
                )
                wrapper.chmod(0o755)

    def _run_daemon(self, program: str, *args: object, key: str | None = None) -> None:
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        with open(self.folder / "log" / f"{key or program}.out", "ab") as log:
            process = subprocess.Popen(
                [shutil.which(program, path=path), *map(str, args)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self.environment, "SLURM_CONF": str(self.folder / "slurm.conf")},
            )
        self._pids.write_text(json.dumps({**self._read_pids(), key or program: process.pid}))

    def _read_pids(self) -> dict[str, int]:
        return json.loads(self._pids.read_text()) if self._pids.is_file() else {}

    def _end(self, name: str, *numbers: signal.Signals) -> None:
        pids = self._read_pids()
        pid = pids.pop(name, None)
        self._pids.write_text(json.dumps(pids))
        if pid is None:
            return
        for number in numbers or (signal.SIGTERM, signal.SIGKILL):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                if _is_gone(pid):
                    return
                time.sleep(0.05)

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).stdout.split()
        return states == ["idle"] * len(self.nodes)


def _is_wrappers(folder: Path) -> bool:
    """Tells whether a folder of PATH is that of another such cluster."""
    return (folder.parent / "slurm.conf").is_file() and (folder.parent / "pids.json").is_file()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait(condition, what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {what} within {seconds} s; see the log folder")
        time.sleep(0.1)


def _is_gone(pid: int) -> bool:
    try:
        if os.waitpid(pid, os.WNOHANG)[0]:  # our own child
            return True
    except ChildProcessError:
        pass
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def main() -> None:
    """Starts or stops a cluster from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("up", "down"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--cpus", type=int, default=4, help="processors that each node says it has")
    args = parser.parse_args()
    missing = missing_programs()
    if missing:
        sys.exit(
            f"not installed: {', '.join(missing)}. apt-get install --no-install-recommends "
            "slurmctld slurmd slurm-client munge"
        )
    cluster = SlurmCluster(args.folder, args.nodes, args.cpus)
    if args.what == "down":
        cluster.stop()
        return
    if cluster.is_up():
        print("It is up already.")
    else:
        cluster.start()
    print(f'{args.nodes} nodes. In this shell:\n    export PATH={cluster.folder / "bin"}:"$PATH"')
    print("then\n    snakemake --profile slurm")


if __name__ == "__main__":
    main()
