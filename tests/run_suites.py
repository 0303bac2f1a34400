"""Runs all test suites in parallel and prints the twenty slowest tests.

python tests/run_suites.py [suite ...] [-- pytest arguments]
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parent
# For warm.py. pytest gets the same from pyproject.toml.
sys.path.insert(0, str(TESTS.parent / "workflow_scripts"))

import warm  # noqa: E402

UNIT = sorted((TESTS / "unit").glob("test_*.py"))
# Files of each. The unit tests take longest, so they run in two halves.
SUITES = {
    "unit-1": [path for path in UNIT if path.stem < "test_pr"],
    "unit-2": [path for path in UNIT if path.stem >= "test_pr"],
    "workflow": [TESTS / "workflow"],
    "slurm": [TESTS / "slurm"],
}
SLOWEST = 20
FIRST = "slurm"  # its jobs have time limits, so the other suites give way to it


def start(suite: str, folder: Path, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """Starts pytest on a suite. Writes output to <folder>/<suite>.log and times to <folder>/<suite>.xml."""
    command = [sys.executable, "-m", "pytest", *map(str, SUITES[suite]), f"--junitxml={folder / suite}.xml"]
    with open(folder / f"{suite}.log", "wb") as log:
        return subprocess.Popen(
            [*command, *arguments],
            stdout=log,
            stderr=log,
            cwd=TESTS.parent,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=None if suite == FIRST else give_way,
        )


def give_way() -> None:
    """Lowers the priority of this process and its session."""
    os.nice(10)
    # Linux may share the cores between sessions, whatever their processes' niceness.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("10")


def read_times(report: Path) -> list[tuple[float, str]]:
    """Returns (seconds, test) for a suite, including setup and teardown."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return [(float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}") for case in cases]


def count(report: Path) -> dict[str, int]:
    """Returns how many tests of a suite passed, failed (including errors) and were skipped."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    return {
        "passed": number["tests"] - failed - number["skipped"],
        "failed": failed,
        "skipped": number["skipped"],
    }


def main() -> int:
    """Runs the given suites, or all. Returns 1 if any failed."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    suites, arguments = words[:cut] or list(SUITES), words[cut + 1 :]
    began, codes = time.monotonic(), {}
    warm_parents = warm.share(start_new_session=True, preexec_fn=give_way)
    with tempfile.TemporaryDirectory() as temporary, warm_parents as environment:
        folder = Path(temporary)
        running: dict[str, subprocess.Popen] = {}
        try:
            for suite in suites:
                running[suite] = start(suite, folder, arguments, environment)
            while len(codes) < len(suites):
                time.sleep(0.5)
                for suite, process in running.items():
                    if suite not in codes and process.poll() is not None:
                        codes[suite] = process.returncode
                        minutes = (time.monotonic() - began) / 60
                        print(f"== {suite}: exit code {process.returncode} after {minutes:.1f} minutes")
                        print((folder / f"{suite}.log").read_text(errors="replace"), flush=True)
        finally:
            for process in running.values():
                process.terminate()
                process.wait()
        reports = [path for suite in suites if (path := folder / f"{suite}.xml").is_file()]
        slowest = sorted((each for report in reports for each in read_times(report)), reverse=True)[:SLOWEST]
        counts = [count(report) for report in reports]
    print(f"== the {len(slowest)} slowest tests")
    for seconds, name in slowest:
        print(f"{seconds:7.1f} s  {re.sub(r'^tests[.]', '', name)}")
    total = {name: sum(each[name] for each in counts) for name in ("passed", "failed", "skipped")}
    print(f"== {(time.monotonic() - began) / 60:.1f} minutes, exit codes {codes}")
    print(", ".join(f"{number} {name}" for name, number in total.items()))
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
