"""The ordered pool of worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from snaketune.common.cli import UserError
from snaketune.common.worker_pool import WorkerPool


def slow_square(number):
    time.sleep(0.01 * (number % 3))
    return number * number


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_results_in_order(processes, count):
    with WorkerPool(slow_square, processes) as pool:
        for _ in range(2):
            assert list(pool.map((number,) for number in range(count))) == [n * n for n in range(count)]


def test_the_stream_is_not_read_ahead_without_end():
    read = []

    def items():
        for number in range(1000):
            read.append(number)
            yield (number,)

    with WorkerPool(slow_square, 2) as pool:
        results = pool.map(items())
        for _ in range(5):
            next(results)
        assert len(read) < 30


def fail_at_seven(number):
    if number == 7:
        raise UserError("seven is bad", found=number)
    if number > 7:
        raise ValueError("a later one")
    return number


def test_the_first_error_comes_out():
    with pytest.raises(UserError, match="seven is bad"), WorkerPool(fail_at_seven, 3) as pool:
        list(pool.map((number,) for number in range(50)))


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error():
    with pytest.raises(RuntimeError, match="worker died"), WorkerPool(die, 2) as pool:
        list(pool.map((number,) for number in range(5)))


def test_workers_end_with_a_killed_parent(repo_root):
    code = (
        "import time\nfrom snaketune.common.worker_pool import WorkerPool\n"
        "pool = WorkerPool(lambda n: time.sleep(0.2) or b'x' * 300000, 3)\n"
        "for n, _ in enumerate(pool.map((n,) for n in range(1000))):\n"
        "    if n == 0: print(*[child.pid for child in pool._children], flush=True)\n"
    )
    scripts = repo_root / "workflow_scripts"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=scripts, stdout=subprocess.PIPE, text=True)
    children = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(children) == 3
    deadline = time.monotonic() + 10
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
