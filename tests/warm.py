"""Scripts in a tenth of the time: each runs in a child forked from a parent that has imported the libraries once.

Importing torch, transformers, DeepSpeed and mmengine takes ten seconds of processor, and the tests start hundreds of
scripts. A warm child is a process like any other: arguments, environment, working folder, files, signals and exit code
are its own. What it cannot show is a fresh interpreter's start, so tests of kills and launchers, and one plain command a
script, start Python themselves (`run_script(..., warm=False)`).

The parent is this file run as a script; it holds a Unix socket, and one connection is one child. A child dies with the
process that asked for it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

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
)
_START_SECONDS = 300


def die_with_parent(parent: int) -> None:
    """Asks Linux to kill this process when the one that started it is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class WarmProcess:
    """A forked script, with the part of `subprocess.Popen` that the tests use."""

    def __init__(self, args: Sequence[str], connection: socket.socket, pid: int):
        self.args, self.pid, self.returncode = list(args), pid, None
        self._connection = connection

    def poll(self) -> int | None:
        """Returns the exit code (negative: the signal), or None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self._read_code()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end and returns the exit code."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._read_code()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signals the script, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the script."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Sends SIGTERM to the script."""
        self.send_signal(signal.SIGTERM)

    def _read_code(self) -> None:
        said = self._connection.recv(64)
        assert said, "the parent of the warm scripts is gone"
        self.returncode = int(said)
        self._connection.close()


class WarmParent:
    """Starts the parent at the first script, and ends it."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    @property
    def address(self) -> Path:
        """The socket of the parent, which is there once this returns."""
        if self._process is None:
            self._folder = tempfile.TemporaryDirectory(prefix="warm-")  # a short path: a socket lies in it
            command = [sys.executable, __file__, f"{self._folder.name}/socket"]
            own = {"PYTHONPATH": f"{SCRIPTS}:{REPO / 'tests'}", "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, env={**os.environ, **own}, stdin=subprocess.DEVNULL)
        path = Path(self._folder.name, "socket")
        deadline = time.monotonic() + _START_SECONDS
        while not path.exists():
            assert self._process.poll() is None and time.monotonic() < deadline, "no parent for warm scripts"
            time.sleep(0.02)
        return path

    def start(
        self,
        args: Sequence[object],
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        start_new_session: bool = False,
    ) -> WarmProcess:
        """Starts a script: `args` are its path and its arguments; `stdin` ... are file descriptors."""
        return start(self.address, args, env, cwd, stdin, stdout, stderr, start_new_session)

    def run(
        self, args: Sequence[object], timeout: float, stdin: int | None = None, **options
    ) -> subprocess.CompletedProcess:
        """Runs a script to its end, like `subprocess.run(..., capture_output=True, text=True)`."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(args, stdin=stdin, stdout=out.fileno(), stderr=err.fileno(), **options)
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
        """Ends the parent, and with it what still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._folder.cleanup()
            self._process = None


PARENT = WarmParent()


def start(
    address: str | os.PathLike,
    args: Sequence[object],
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    start_new_session: bool = False,
) -> WarmProcess:
    """Asks the parent at `address` for a script, see `WarmParent.start`."""
    words = [str(word) for word in args]
    asked = {
        "args": words,
        "env": dict(os.environ if env is None else env),
        "cwd": str(cwd or Path.cwd()),
        "new_session": start_new_session,
    }
    with open(os.devnull) as null:
        files = [null.fileno() if stdin is None else stdin]
        files += [1 if stdout is None else stdout, 2 if stderr is None else stderr]
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(address))
        with tempfile.TemporaryFile() as request:  # an environment may be larger than a packet
            request.write(json.dumps(asked).encode())
            request.flush()
            socket.send_fds(connection, [b"."], [request.fileno(), *files])
    pid = int(connection.recv(64))
    return WarmProcess(words, connection, pid)


def serve(address: str) -> tuple[dict, list[int]]:
    """Forks a child for each connection. Returns in a child only: what was asked for, and its three files."""
    for name in _LIBRARIES:
        __import__(name)
    from sft.launch import import_for_training

    import_for_training()
    gc.freeze()  # a collection in a child would copy every page
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
            with contextlib.suppress(ProcessLookupError):  # who asked is gone
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
    """Turns this forked child into the script that was asked for, and runs it."""
    if asked["new_session"]:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (open as long as the process)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.reconfigure(line_buffering=number == 2 or os.isatty(number))
    os.chdir(asked["cwd"])
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(asked["env"])
    script, home = asked["args"][0], os.path.dirname(os.path.abspath(asked["args"][0]))
    paths = [path for path in asked["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [home, *paths, *(path for path in sys.path if path not in (*before, str(REPO / "tests")))]
    if Path(home) != SCRIPTS:  # another copy of the code, which imports its own
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(f"{SCRIPTS}/"):
                del sys.modules[name]
    import numpy
    import torch

    numpy.random.seed()
    threads = asked["env"].get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(threads) if threads.isdecimal() else len(os.sched_getaffinity(0)))
    sys.argv = asked["args"]
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    """Serves; in a child, runs the script and ends as Python would, but without clearing away what all share."""
    die_with_parent(os.getppid())
    asked, files = serve(sys.argv[1])
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
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
