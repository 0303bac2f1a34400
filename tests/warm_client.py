"""Requests warm scripts from their parent (tests/warm.py). A library, and the `python` of the rules in tests.

As a script, `warm_client.py <address> <script> [arguments]` behaves like the script: it forwards signals and
ends the same way. It imports little, because it runs with every job of a workflow (`python -I -S`: a
hundredth of a second).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class WarmProcess:
    """A forked script, with the subset of `subprocess.Popen` that the tests use."""

    def __init__(self, args: Sequence[str], connection: socket.socket, pid: int):
        self.args, self.pid, self.returncode = list(args), pid, None
        self._connection = connection

    def poll(self) -> int | None:
        """Returns the exit code (negative for a signal), or None while the script runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self._read_code()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the script to end and returns its exit code."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                import subprocess

                raise subprocess.TimeoutExpired(self.args, timeout)
            self._read_code()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the script, unless it has ended."""
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
        assert said, "the parent of warm scripts has exited"
        self.returncode = int(said)
        self._connection.close()


def start(
    address: str | os.PathLike,
    args: Sequence[object],
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    start_new_session: bool = False,
    executable: str | os.PathLike | None = None,
) -> WarmProcess:
    """Requests a script from the parent at `address`, see `warm.WarmParent.start`."""
    words = [str(word) for word in args]
    asked = {
        "args": words,
        "env": dict(os.environ if env is None else env),
        "cwd": str(cwd or os.getcwd()),
        "new_session": start_new_session,
        "executable": str(executable or ""),
    }
    with open(os.devnull) as null, os.fdopen(os.memfd_create("request"), "wb") as request:
        files = [null.fileno() if stdin is None else stdin]
        files += [1 if stdout is None else stdout, 2 if stderr is None else stderr]
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(address))
        request.write(json.dumps(asked).encode())  # an environment may be larger than a packet
        request.flush()
        socket.send_fds(connection, [b"."], [request.fileno(), *files])
    pid = int(connection.recv(64))
    return WarmProcess(words, connection, pid)


def main() -> None:
    """Runs the script, and ends the same way."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDED_ON)
    executable = os.environ.pop("WARM_EXECUTABLE", None)  # of the script, so that what it starts is warm too
    script = start(*sys.argv[1:2], sys.argv[2:], stdin=0, executable=executable)

    def hand_on(number: int, _) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(script.pid, number)

    for number in _HANDED_ON:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON)
    code = script.wait()
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
