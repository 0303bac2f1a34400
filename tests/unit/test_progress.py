"""Progress as a terminal shows it, and as a log holds it."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest
from ftdp_files import GOOD, source_of
from ftdp_small_tokenizers import extended_folder

from snaketune.common import progress as module
from snaketune.common.progress import Progress
from terminal import read_terminal


@pytest.fixture
def clock(monkeypatch):
    """Lets time pass when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_line_now_and_then(clock):
    log = io.StringIO()
    progress = Progress("bytes", 400_000_000, "samples", "tokens", stream=log, every=30)
    for _ in range(100):
        clock(1)
        progress.add("chat", bytes=1_000_000, samples=200, tokens=5000)
    assert log.getvalue().splitlines() == [
        "chat: 8%, 6,000 samples (200/s), 150,000 tokens (5,000/s), 1 MB/s, 6 min 10 s left",
        "chat: 15%, 12,000 samples (200/s), 300,000 tokens (5,000/s), 1 MB/s, 5 min 40 s left",
        "chat: 22%, 18,000 samples (200/s), 450,000 tokens (5,000/s), 1 MB/s, 5 min 10 s left",
    ]
    assert progress.finish() == "20,000 samples (200/s), 500,000 tokens (5,000/s), 1 MB/s in 1 min 40 s"


def test_a_terminal_gets_a_bar_on_one_line(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    progress = Progress("bytes", 8_000_000, "rows", stream=terminal)
    for _ in range(8):
        clock(0.5)
        progress.add("a long name " * 20, bytes=1_000_000, rows=7)
    shown = terminal.getvalue().split("\r")[1:]
    assert len(shown) == 8 and "\n" not in terminal.getvalue()
    assert shown[1].startswith(" 25% [###.........] 3.0 s left, 14 rows/s, 2 MB/s, a long")
    assert all(len(line.removesuffix("\x1b[K")) <= 99 for line in shown)
    assert progress.finish().startswith("56 rows")
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_nothing_done_and_nothing_to_do(clock):
    log = io.StringIO()
    progress = Progress("tokens", 0, stream=log, every=1)
    clock(2)
    progress.add("x", tokens=0)
    assert log.getvalue() == "x: 100%\n"
    assert progress.finish() == " in 2.0 s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (61, "1 min 01 s"), (7384, "2 h 03 min")]
)
def test_the_clock(seconds, text):
    assert module._clock(seconds) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_training_has_one_line_in_a_terminal_and_plain_lines_in_a_log(terminal, monkeypatch):
    from snaketune.training.progress_line import ProgressLine, say

    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    line = ProgressLine(done=2, total=6, interval=2)
    for step in (3, 4, 5, 6):
        line.show(step, f"loss {step}.5", eta_seconds=60.0 * (6 - step))
        if step == 4:
            say("Saved")
    line.close()
    shown = stream.getvalue()
    if terminal:
        # Two lines stay: what was said in between, and the bar at its end.
        said, bar = shown.strip("\r\n").split("\n")
        assert said.split("\r")[-1].strip() == "Saved"
        assert bar.split("\r")[-1].strip() == f"Step 6/6 |{'#' * 16}| loss 6.5  ETA 0:00:00"
    else:
        assert shown == "Step 4/6  loss 4.5  ETA 0:02:00\nSaved\nStep 6/6  loss 6.5  ETA 0:00:00\n"


def test_a_script_in_a_terminal_and_in_a_log(tmp_path, repo_root):
    source_of(tmp_path).write_bytes((GOOD + b"\n") * 30_000)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    script = repo_root / "workflow_scripts" / "tokenize_dataset.py"
    command = [
        sys.executable,
        script,
        "--processed-dir",
        tmp_path / "in",
        "--tokenizer-path",
        extended_folder(),
    ]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        [*map(str, command), "--tokenized-dir", str(tmp_path / "out1"), "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
    ) as process:
        shown = read_terminal(ours, theirs)
        output = process.stdout.read().decode()
    assert process.returncode == 0
    bar = re.search(
        rb"\r +\d+% \[#*\.*\] [\d.]+ s left, [\d,.]+ documents/s, [\d,.]+ tokens/s, [\d.]+ MB/s", shown
    )
    assert bar and b"\n" not in shown, shown
    assert re.search(
        r"tokenised 1 datasets: 30,000 documents \(.*/s\), .* tokens \(.*/s\), .* MB/s in .* s", output
    )
    log = subprocess.run(
        [*map(str, command), "--tokenized-dir", str(tmp_path / "out2")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert log.stderr == ""
