"""Tokenises many dataset folders on a local Slurm cluster of four nodes; prints the times of its jobs.

Needs Debian's slurmctld, slurmd, slurm-client and munge (see tests/slurm/cluster.py). All nodes are this
host, so the run time of jobs says little about a real cluster. The time around them is Snakemake's and
Slurm's overhead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "tests" / "slurm"))

from cluster import SlurmCluster  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=int, default=5000, help="dataset folders (default: 5000)")
    parser.add_argument(
        "--conversations", type=int, default=40, help="conversations per folder (default: 40)"
    )
    parser.add_argument("--batch-mb", type=int, default=4, help="tokenize.batch_mb (default: 4)")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that each node reports (default: 2)")
    parser.add_argument("--model", default=REPO / "resources/tiny-mistral", type=Path, help="a model folder")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    cluster = SlurmCluster(folder / "slurm", cpus=args.cpus)
    try:
        size = make_project(folder, args)
        print(
            f"{args.folders} dataset folders, {size / 1e6:.0f} MB, tokenize.batch_mb {args.batch_mb}",
            flush=True,
        )
        cluster.start()
        measure(folder, cluster)
    finally:
        cluster.stop()
        shutil.rmtree(folder)


def make_project(folder: Path, args: argparse.Namespace) -> int:
    """Writes the config and the folders, each with different text; returns the bytes of the conversations."""
    size = 0
    for number in range(args.folders):
        file = folder / "processed" / f"set{number:05d}" / "processed" / "chat" / "data.jsonl"
        file.parent.mkdir(parents=True)
        lines = []
        for talk in range(args.conversations):
            question = (
                f"In set {number}, what is {talk} times {number}, and how do you reckon it in your head?"
            )
            answer = f"It is {talk * number}. " + f"Take {number} once for each of {talk} and add. " * 6
            talks = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps(talks) + "\n")
        file.write_text("".join(lines))
        size += file.stat().st_size
    config = {
        "model": {"path": str(args.model.resolve())},
        "data": {"processed_dir": "processed"},
        "tokenize": {"batch_mb": args.batch_mb},
        "turbomind": {"enabled": False},
        "runs": {"run": {}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return size


def measure(folder: Path, cluster: SlurmCluster) -> None:
    """Runs the target `tokenize` and checks Slurm's queue every two seconds."""
    command = [sys.executable, "-m", "snakemake", "tokenize", "--profile", "slurm"]
    command += ["--directory", folder, "--configfile", folder / "config.json"]
    log, began = folder / "controller.log", time.time()
    with open(log, "wb") as output:
        running = subprocess.Popen(
            [*map(str, command)],
            cwd=REPO,
            env={**cluster.environment, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
    jobs: dict[str, list[str]] = {}
    while running.poll() is None:
        time.sleep(2)
        remember(jobs, cluster)
    took = time.time() - began
    remember(jobs, cluster)
    if running.returncode:
        sys.exit(log.read_text()[-4000:])
    times = [[seconds(text) - began for text in job] for job in jobs.values()]
    submitted, started, ended = ([time[column] for time in times] for column in range(3))
    waited = [start - submit for submit, start, _ in times]
    lasted = [end - start for _, start, end in times]
    print(f"{len(jobs)} Slurm jobs; seconds since `snakemake` was started, on {os.cpu_count()} real cores:")
    print(f"  submitted  first {min(submitted):.0f}, last batch {sorted(submitted)[-2]:.0f}")
    print(
        f"  started    first {min(started):.0f}; waited for a node: median {statistics.median(waited):.0f} s"
    )
    print(
        f"  ended      last {max(ended):.0f}; run time: median {statistics.median(lasted):.0f} s, {max(lasted):.0f} s at most"
    )
    print(f"  finished   {took:.0f}, {took - max(ended):.0f} after the last job")


def remember(jobs: dict[str, list[str]], cluster: SlurmCluster) -> None:
    """Records when each job was submitted, started and ended, as far as known."""
    for line in cluster.run(
        "squeue", "-h", "-t", "all", "-o", "%i %V %S %e", check=False
    ).stdout.splitlines():
        number, *times = line.split()
        jobs[number] = times


def seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


if __name__ == "__main__":
    main()
