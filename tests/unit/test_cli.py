"""How scripts exit: errors without a traceback, closed pipes, full disks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from snaketune.common.files import write_json

CLOSED = 128 + 13  # as a shell reports a process killed by SIGPIPE

PRINTS = "for number in range(100_000): print(number)"
PRINTS_LITTLE = "print('one line')"
FAILS = "print('one line'); raise UserError('wrong', fix='put it right')"
WORKER_GONE = (
    "import subprocess\n"
    "    worker = subprocess.Popen('true', stdin=subprocess.PIPE)\n"
    "    worker.wait()\n"
    "    os.write(worker.stdin.fileno(), b'a task')"
)


@pytest.fixture(autouse=True)
def buffered(monkeypatch):
    """Unsets PYTHONUNBUFFERED, so output reaches the closed pipe only when it is flushed."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture
def script(tmp_path, repo_root):
    """Returns a function that returns the command of a script whose `main` has the given body."""

    def write(body: str) -> list[str]:
        path = tmp_path / "script.py"
        path.write_text(
            "import os, sys\n"
            f"sys.path.insert(0, {str(repo_root / 'workflow_scripts')!r})\n"
            "from snaketune.common.cli import UserError, run\n"
            f"def main():\n    {body}\n"
            "run(main)\n"
        )
        return [sys.executable, str(path)]

    return write


def run_closed(command: list[str]) -> subprocess.CompletedProcess:
    """Runs a command whose standard output has no reader."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)


@pytest.mark.parametrize("body", [PRINTS, PRINTS_LITTLE])
def test_a_closed_pipe_ends_a_script_quietly(script, body):
    done = run_closed(script(body))
    assert (done.returncode, done.stderr) == (CLOSED, "")


def test_head_gets_its_lines_and_no_more(script):
    command = " ".join(script(PRINTS))
    line = f"set -o pipefail; {command} | head -n 2; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (CLOSED, "0\n1\n", "")


def test_real_scripts_end_quietly_too(repo_root, tmp_path):
    write_json(tmp_path / "training.json", {"steps": [3, 6]})
    scripts = repo_root / "workflow_scripts"
    listed = [
        scripts / "list_checkpoints.py",
        tmp_path / "training.json",
        "--output",
        tmp_path / "saved.json",
    ]
    for command in ([scripts / "lineage.py", "--help"], listed):
        done = run_closed([sys.executable, *map(str, command)])
        assert (done.returncode, done.stderr) == (CLOSED, "")
    assert (tmp_path / "saved.json").is_file()


def test_an_error_is_still_told(script):
    done = run_closed(script(FAILS))
    assert (done.returncode, done.stderr) == (CLOSED, "error: wrong\n  to fix:   put it right\n")
    done = subprocess.run(script(FAILS), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "one line\n")


def test_a_full_disk_is_told_once(script):
    with open("/dev/full", "w") as full:
        done = subprocess.run(script(PRINTS_LITTLE), stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: No space left on device; free some space and run again\n",
    )


def test_another_pipe_that_breaks_is_a_fault(script):
    done = subprocess.run(script(WORKER_GONE), capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr
