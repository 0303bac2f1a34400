"""Starts the ranks of a run, and makes sure that none outlives the others.

The ranks of a host are forked from the process that starts them, and share the modules it has imported.
Importing torch, transformers, DeepSpeed and mmengine costs ten seconds of CPU time, once per host instead of
once per rank.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from multiprocessing.process import BaseProcess

from snaketune.common.cli import UserError
from snaketune.training.early_stop import EXIT_RESUME
from snaketune.training.run_lock import ask_slurm

# Count GPUs with NVML, which creates no CUDA context: a context would not survive the fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

_STEP_IN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_HANDED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# CPU seconds that the parent process spent on behalf of all ranks of the host.
_PARENT_SECONDS = "SNAKETUNE_PARENT_SECONDS"


def join_environment(launcher: str) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for this process.

    Args:
        launcher: `none` (one process), `pytorch` (torchrun has set them) or `slurm` (derived from srun's
            variables).

    Raises:
        UserError: The launcher's variables are not set.
    """
    if launcher == "none":
        values = {
            "RANK": 0,
            "WORLD_SIZE": 1,
            "LOCAL_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
    elif launcher == "slurm":
        values = slurm_environment(os.environ)
    else:
        missing = [name for name in _STEP_IN if name not in os.environ]
        if missing:
            raise UserError(
                f"--launcher pytorch, but {', '.join(missing)} is not set",
                fix="start it with torchrun, or use --processes without --launcher",
            )
        values = {}
    os.environ.update({name: str(value) for name, value in values.items()})


def slurm_environment(environment: dict[str, str]) -> dict[str, object]:
    """Returns the five variables for a task that srun started.

    The rendezvous is the address of the node where srun runs, because node names may not resolve. Its port is
    derived from the job ID, so that two jobs on one node do not collide.
    """
    needed = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_LAUNCH_NODE_IPADDR", "SLURM_JOB_ID")
    missing = [name for name in needed if name not in environment]
    if missing:
        raise UserError(
            f"--launcher slurm, but {', '.join(missing)} is not set",
            fix="start it with srun inside a Slurm job",
        )
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", environment["SLURM_LAUNCH_NODE_IPADDR"]),
        "MASTER_PORT": environment.get("MASTER_PORT", 20000 + int(environment["SLURM_JOB_ID"]) % 10000),
    }


def free_port() -> int:
    """Returns a TCP port that is currently free on this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent(parent: int) -> None:
    """Makes Linux kill this process when its parent ends, however the parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # the parent ended before prctl
        os.kill(os.getpid(), signal.SIGKILL)


def run_ranks(
    command: list[str],
    processes: int,
    hosts: int = 1,
    host: int = 0,
    master: tuple[str, int] | None = None,
) -> int:
    """Runs `command` once per rank on this host and returns the exit code.

    The code is that of a killed rank, else the first that is not 0, else 0. Each rank is forked from this
    process and runs the script as `__main__`. If a rank fails or is killed, the others are killed too: they
    would wait for it forever. SIGTERM, SIGUSR1 and SIGINT are forwarded to the ranks, which take the time to
    save and exit with code 75. A second SIGINT kills them at once.

    Args:
        command: This Python, a script and its arguments. Each rank gets the environment that `--launcher
            pytorch` reads.
        processes: Number of ranks on each host.
        hosts: Number of hosts in the run. Each of them calls this function.
        host: Index of this host.
        master: Address and port of host 0, where the ranks meet; None if there is only one host.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    address, port = master or ("127.0.0.1", free_port())
    shared = {"WORLD_SIZE": hosts * processes, "MASTER_ADDR": address, "MASTER_PORT": port}
    shared |= {"SNAKETUNE_PARENT": os.getpid(), _PARENT_SECONDS: round(time.process_time(), 3)}
    shared |= thread_limits(os.environ.get("OMP_NUM_THREADS", threads))
    ranks: list[BaseProcess] = []
    interrupts: list[int] = []

    def hand_on(number: int, _frame) -> None:
        if number == signal.SIGINT:
            interrupts.append(number)
        for rank in ranks:
            if rank.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, number)

    handlers = {number: signal.signal(number, hand_on) for number in _HANDED_ON}
    try:
        for local in range(processes):
            own = {**shared, "RANK": host * processes + local, "LOCAL_RANK": local}
            environment = {name: str(value) for name, value in own.items()}
            ranks.append(_fork(command, environment))
        while len(interrupts) < 2:
            codes = [rank.exitcode for rank in ranks]
            bad = [(number, code) for number, code in enumerate(codes) if code not in (None, 0, EXIT_RESUME)]
            if bad:
                wait_all(ranks, patience=2.0)  # the others may still print an error
                # If a rank was killed, that is the cause of the other failures.
                number, code = min(bad, key=lambda each: each[1] > 0)
                cause = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                print(
                    f"Rank {host * processes + number} {cause}; killing the others",
                    file=sys.stderr,
                    flush=True,
                )
                return code if code > 0 else 128 - code
            if None not in codes:
                return max(codes)
            time.sleep(0.2)
        return 128 + signal.SIGINT
    finally:
        end_all(ranks)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _fork(command: list[str], environment: dict[str, str]) -> BaseProcess:
    """Forks a rank. Signals that arrive in the meantime are blocked, then delivered to this process only."""
    sys.stdout.flush()
    sys.stderr.flush()
    context = multiprocessing.get_context("fork")
    name = f"rank {environment['RANK']}"
    rank = context.Process(target=_be_rank, args=(command, environment), name=name)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDED_ON)
    try:
        rank.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return rank


def _be_rank(command: list[str], environment: dict[str, str]) -> None:
    """Runs `command` in this forked process as a new Python process would."""
    for number in _HANDED_ON:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON)
    die_with_parent(int(environment["SNAKETUNE_PARENT"]))
    os.environ.update(environment)
    torch = sys.modules.get("torch")
    if torch is not None:
        if torch.cuda._is_in_bad_fork():  # an import initialized CUDA, which does not survive a fork
            os.environ[_PARENT_SECONDS] = "0"
            os.execv(command[0], command)
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = command[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(command[1]))
    try:
        runpy.run_path(command[1], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # from Python 3.14 on, multiprocessing does this
        sys.stdout.flush()


def core_seconds() -> float:
    """Returns the CPU seconds of this rank. The first rank of a host includes its parent's."""
    shared = float(os.environ.get(_PARENT_SECONDS, 0)) if os.environ.get("LOCAL_RANK") == "0" else 0.0
    return time.process_time() + shared


def run_step(command: list[str], nodes: int, processes: int, cpus: int, gpus: int) -> int:
    """Runs `command` as one step of this Slurm job, with one task per node, and returns srun's exit code.

    Each task forks the ranks of its node (`run_node`). The exit code is the highest among the tasks (128 +
    the number of a signal). If a task fails, srun kills the others. Slurm signals the tasks and this process
    directly; this process then waits for the tasks.

    Args:
        command: This Python, a script and its arguments.
        nodes: Nodes of the step.
        processes: Ranks per node.
        cpus: CPUs per rank.
        gpus: GPUs per node.
    """
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    step += [f"--cpus-per-task={processes * cpus}", "--kill-on-bad-exit=1"]
    if gpus:
        step.append(f"--gres=gpu:{gpus}")
    handlers = {number: signal.signal(number, lambda *_: None) for number in _HANDED_ON}
    # This process and rank 0 run on the job's first node, so a port that is free here is free there.
    port = os.environ.get("MASTER_PORT", str(free_port()))
    environment = {**os.environ, **thread_limits(cpus), "MASTER_PORT": port}
    try:
        return subprocess.run([*step, *command], env=environment).returncode
    except FileNotFoundError:
        raise UserError("--launcher srun, but srun is not on PATH", fix="start it in a Slurm job") from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_node(command: list[str], processes: int) -> int:
    """Runs this node's ranks in a task that `run_step` started, and returns their exit code."""
    task = slurm_environment(os.environ)
    master = (task["MASTER_ADDR"], int(task["MASTER_PORT"]))
    return run_ranks(command, processes, int(task["WORLD_SIZE"]), int(task["RANK"]), master)


def thread_limits(threads: int | str) -> dict[str, str]:
    """Returns the variables that set a rank's threads. Snakemake sets MKL's to those of the whole job."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def slurm_start_time() -> float:
    """Returns when this Slurm job and its time limit started, in seconds since 1970; now if unknown."""
    said = ask_slurm("squeue", "-h", "-j", os.environ.get("SLURM_JOB_ID", ""), "-o", "%S")
    try:
        return datetime.fromisoformat(said).timestamp()
    except ValueError:
        return time.time()


def end_all(ranks: list[BaseProcess]) -> None:
    """Kills the processes still running. On SIGTERM they would try to save and wait for ranks that ended."""
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
            rank.join()


def wait_all(ranks: list[BaseProcess], patience: float) -> None:
    """Waits for all processes to end, at most `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and any(rank.is_alive() for rank in ranks):
        time.sleep(0.05)
