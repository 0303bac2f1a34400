"""Runs scripts in a tenth of the time: each in a child forked from a parent with all libraries imported.

Importing torch, transformers, DeepSpeed and mmengine takes ten seconds of CPU time, and the tests start
hundreds of scripts. A warm child has its own arguments, environment, working folder, files, signals and exit
code, like any other process. It cannot test the start of a new interpreter, so tests of kills and launchers,
and one plain command per script, start Python themselves (`run_script(..., warm=False)`).

A parent is this file run as a script. It listens on a Unix socket, and each connection is one child
(tests/warm_client.py). A child is killed when the process that requested it ends. `PARENT` is for our
scripts, `SNAKEMAKE` for Snakemake, whose modules and paths must stay invisible to the scripts. Suites that
run at the same time share the parents (`share`).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from snaketune.training.launch import die_with_parent
from warm_client import WarmProcess, start

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = REPO / "workflow_scripts"
_LIBRARIES = (
    *("numpy", "yaml", "jinja2", "tokenizers", "torch", "torch.utils.tensorboard", "safetensors.torch"),
    *(
        "transformers",
        "transformers.models.llama.modeling_llama",
        "transformers.models.mistral.modeling_mistral",
    ),
    *("transformers.generation.utils", "peft", "deepspeed", "mmengine.runner", "matplotlib.figure"),
    "sft:import_for_training",
)
_SNAKEMAKE = (
    *("snakemake.cli", "snakemake.storage", "snakemake.report.html_reporter"),
    *("snakemake_executor_plugin_slurm", "requests", "jsonschema", "pulp"),
)
_START_SECONDS = 300


class WarmParent:
    """Starts a parent for the first script, and ends it.

    Args:
        libraries: Modules that it imports. For `module:function`, it also calls the function.
        python: Its interpreter.
        shared: Environment variable with the socket of a parent that another process has started, if any.
    """

    started: ClassVar[list[WarmParent]] = []

    def __init__(self, libraries: Sequence[str], python: str = sys.executable, shared: str = ""):
        self._libraries, self._python, self.shared = libraries, python, shared
        self._process: subprocess.Popen | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    def launch(self, **options) -> Path:
        """Starts the parent if it is not running, and returns the path where it will create its socket.

        Args:
            options: Further ones of `subprocess.Popen`.
        """
        if self.shared in os.environ:
            return Path(os.environ[self.shared])
        if self._process is None:
            self._folder = tempfile.TemporaryDirectory(prefix="warm-")  # a short path, for the socket
            command = [self._python, __file__, f"{self._folder.name}/socket", *self._libraries]
            own = {"PYTHONPATH": f"{SCRIPTS}:{REPO / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self._process = subprocess.Popen(
                command, env={**os.environ, **own}, stdin=subprocess.DEVNULL, **options
            )
            self.started.append(self)
        return Path(self._folder.name, "socket")

    def client_command(self) -> str:
        """Returns the shell command that runs a script of this parent, followed by the script and its arguments."""
        client = [sys.executable, "-I", "-S", REPO / "tests" / "warm_client.py", self.launch()]
        return shlex.join(map(str, client))

    @property
    def address(self) -> Path:
        """The socket of the parent. Waits until it exists."""
        path = self.launch()
        deadline = time.monotonic() + _START_SECONDS
        while not path.exists():
            ended = self._process is not None and self._process.poll() is not None
            assert not ended and time.monotonic() < deadline, "the parent of warm scripts did not start"
            time.sleep(0.02)
        return path

    def start(self, args: Sequence[object], **options) -> WarmProcess:
        """Starts a script.

        Args:
            args: Its path and arguments; or `-m`, a module, and its arguments; or `-c`, a program, and its arguments.
            options: `env`, `cwd` and `start_new_session` as in `subprocess.Popen`. `stdin`, `stdout` and
                `stderr` are file descriptors. `executable` becomes the script's `sys.executable`.
        """
        return start(self.address, args, **options)

    def run(
        self, args: Sequence[object], timeout: float, input: str = "", **options
    ) -> subprocess.CompletedProcess:
        """Runs a script to its end, like `subprocess.run(..., capture_output=True, text=True)`."""
        with contextlib.ExitStack() as stack:
            given, out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
            given.write(input)
            given.seek(0)
            files = {"stdin": given.fileno(), "stdout": out.fileno(), "stderr": err.fileno()}
            process = self.start(args, **files, **options)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
        return subprocess.CompletedProcess(process.args, code, *texts)

    def close(self) -> None:
        """Kills the parent and all scripts that are still running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._folder.cleanup()
            self._process = None


PARENT = WarmParent(_LIBRARIES, shared="SNAKETUNE_TEST_PARENT")
SNAKEMAKE = WarmParent(_SNAKEMAKE, shared="SNAKETUNE_TEST_SNAKEMAKE")


@contextlib.contextmanager
def share(**options) -> Iterator[dict[str, str]]:
    """Starts the parents; yields the environment in which other processes use them. Ends them at last.

    Args:
        options: As of `WarmParent.launch`.
    """
    try:
        yield {parent.shared: str(parent.launch(**options)) for parent in (PARENT, SNAKEMAKE)}
    finally:
        PARENT.close()
        SNAKEMAKE.close()


def serve(address: str, libraries: Sequence[str]) -> tuple[dict, list[int]]:
    """Forks a child for each connection. Returns only in a child: the request, and its three files."""
    for name in libraries:
        name, _, function = name.partition(":")
        module = import_module(name)
        if function:
            getattr(module, function)()
    gc.freeze()  # garbage collection in a child would copy every page
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{address}.new")
    listener.listen(64)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    os.rename(f"{address}.new", address)
    children: dict[int, socket.socket] = {}
    while True:
        ready = select.select([listener, woken, *children.values()], [], [])[0]
        for pid in [pid for pid, connection in children.items() if connection in ready]:
            with contextlib.suppress(ProcessLookupError):  # the requester is gone
                os.kill(pid, signal.SIGKILL)
            children.pop(pid).close()
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                connection = children.pop(ended[0], None)
                if connection is not None:
                    with contextlib.suppress(OSError):
                        connection.send(str(os.waitstatus_to_exitcode(ended[1])).encode())
                    connection.close()
        if listener in ready:
            connection = listener.accept()[0]
            files = socket.recv_fds(connection, 16, 4)[1]
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (listener, connection, *children.values()):
                    each.close()
                os.close(wake)
                os.close(woken)
                with os.fdopen(files[0], "rb") as request:
                    request.seek(0)
                    return json.load(request), files[1:]
            children[pid] = connection
            connection.send(str(pid).encode())
            for each in files:
                os.close(each)


def become(asked: dict, files: list[int]) -> None:
    """Turns this forked child into the requested script, and runs it."""
    if asked["new_session"]:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (open for the life of the process)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.reconfigure(line_buffering=number == 2 or os.isatty(number))
    os.chdir(asked["cwd"])
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.executable = asked["executable"] or sys.executable
    script, *arguments = asked["args"]
    home = os.getcwd() if script in ("-m", "-c") else os.path.dirname(os.path.abspath(script))
    paths = [path for path in asked["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [home, *paths, *(path for path in sys.path if path not in (*before, str(REPO / "tests")))]
    if Path(home) != SCRIPTS:  # another checkout, which imports its own modules
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(f"{SCRIPTS}/"):
                del sys.modules[name]
    if "torch" in sys.modules:
        import numpy
        import torch

        numpy.random.seed()
        threads = asked["env"].get("OMP_NUM_THREADS", "")
        torch.set_num_threads(int(threads) if threads.isdecimal() else len(os.sched_getaffinity(0)))
    if script == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(arguments[0], {"__name__": "__main__"})
    elif script == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = asked["args"]
        runpy.run_path(script, run_name="__main__")


def main() -> None:
    """Serves requests. A child runs its script and exits like Python, but without freeing shared memory."""
    die_with_parent(os.getppid())
    asked, files = serve(sys.argv[1], sys.argv[2:])
    code = 0
    try:
        become(asked, files)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for non-daemon threads
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
