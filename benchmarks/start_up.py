"""Measures the time from the command to the first training step: forked ranks against a new Python per rank.

    python benchmarks/start_up.py [--ranks 1 2 8] [--rounds 3]

Uses a tiny model on this host's CPUs, one thread per rank. Prints elapsed seconds, CPU seconds and their
ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "workflow_scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from measuring import cpu_of_children
from snaketune.training.launch import free_port
from tiny_run import REPO, make_world, metrics, render, start, wait_for_step


def forked(config: Path, work_dir: Path, ranks: int) -> list[subprocess.Popen]:
    """Starts train_model.py, which forks its ranks."""
    return [start(config, work_dir, processes=ranks, warm=False)]


def fresh(config: Path, work_dir: Path, ranks: int) -> list[subprocess.Popen]:
    """Starts a new Python for each rank, like torchrun."""
    script = REPO / "workflow_scripts" / "train_model.py"
    command = [sys.executable, script, config, "--work-dir", work_dir, "--launcher", "pytorch"]
    port, processes = free_port(), []
    with open(work_dir.with_name(f"{work_dir.name}.log"), "ab") as log:
        for rank in range(ranks):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            own |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            words = list(map(str, command))
            processes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
    return processes


def measure(kind, config: Path, work_dir: Path, ranks: int) -> tuple[float, float]:
    """Returns the seconds to the first step and the CPU seconds of the whole run of two steps."""
    began, before = time.monotonic(), cpu_of_children()
    processes = kind(config, work_dir, ranks)
    wait_for_step(processes[0], work_dir, 1)
    seconds = time.monotonic() - began
    if any(process.wait(timeout=600) for process in processes) or len(metrics(work_dir)) != 2:
        raise SystemExit(f"a run failed: see {work_dir}.log")
    return seconds, cpu_of_children() - before


def main() -> None:
    """Alternates the measurements and prints the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8], help="numbers of ranks")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        world = make_world(Path(temporary))
        config = render(world, "config.py", "--max-steps", 2, "--save-steps", 0, "--global-batch", 8)
        print("ranks  forked: first step, CPU time    fresh: first step, CPU time    ratios")
        for ranks in arguments.ranks:
            taken: dict[str, list[tuple[float, float]]] = {"forked": [], "fresh": []}
            for number in range(arguments.rounds):
                for kind in (forked, fresh):
                    folder = world / f"{kind.__name__}_{ranks}_{number}"
                    taken[kind.__name__].append(measure(kind, config, folder, ranks))
            a, b = ([statistics.median(each) for each in zip(*taken[name], strict=True)] for name in taken)
            figures = f"{a[0]:12.1f} s {a[1]:10.1f} s {b[0]:20.1f} s {b[1]:10.1f} s"
            print(f"{ranks:5d}  {figures}   {b[0] / a[0]:.2f}, {b[1] / a[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
