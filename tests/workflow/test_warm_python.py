"""The `python` of warm jobs behaves like the script: both exit alike, and the script dies with it."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from warm import PARENT


@pytest.fixture
def start(warm_python, tmp_path):
    """Returns a function that starts a script of the given lines with the warm `python`."""
    assert PARENT.address.exists()

    def run(*lines: str) -> subprocess.Popen:
        script = tmp_path / "script.py"
        script.write_text("\n".join(["import os, signal, sys, time", *lines]))
        return subprocess.Popen(
            [warm_python, script, "one", "two"], stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )

    return run


@pytest.mark.parametrize(
    ("line", "code"), [("sys.exit(75)", 75), ("os.kill(os.getpid(), signal.SIGKILL)", -9), ("1 / 0", 1)]
)
def test_it_ends_as_the_script_does(start, tmp_path, line, code):
    process = start("print(sys.argv[1:], os.getcwd(), flush=True)", line)
    assert process.communicate(timeout=60)[0] == f"{['one', 'two']} {tmp_path}\n"
    assert process.returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_script(start, number):
    handler = f"signal.signal({int(number)}, lambda *_: (print('told', flush=True), os._exit(3)))"
    process = start(handler, "print('ready', flush=True)", "time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "told\n" and process.returncode == 3


def test_the_script_dies_with_it(start):
    process = start("print(os.getpid(), flush=True)", "time.sleep(60)")
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the script is still running"
        time.sleep(0.02)
