"""Times `snakemake -n` on many dataset folders and prints the number of jobs."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import cpu_of_children

REPO = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=int, nargs="+", default=[50, 500, 5000], help="numbers of folders")
    parser.add_argument("--model", default=REPO / "resources/tiny-mistral", type=Path, help="a model folder")
    args = parser.parse_args()
    for count in args.folders:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), count, args.model)


def measure(folder: Path, count: int, model: Path) -> None:
    """Creates `count` folders with one small file each and runs the dry run twice."""
    line = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) + "\n"
    for number in range(count):
        file = folder / "processed" / f"set{number:05d}" / "processed" / "chat" / "data.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(line * 20)
    config = {
        "model": {"path": str(model)},
        "data": {"processed_dir": "processed"},
        "turbomind": {"enabled": False},
        "runs": {"run": {}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "snakemake", "--snakefile", REPO / "Snakefile", "--directory", folder]
    command += ["--configfile", folder / "config.json", "--cores", 2, "-n", "--quiet", "rules"]
    for which in ("first", "second"):
        start, cpu = time.perf_counter(), cpu_of_children()
        done = subprocess.run([*map(str, command)], cwd=REPO, capture_output=True, text=True, check=False)
        seconds, cpu = time.perf_counter() - start, cpu_of_children() - cpu
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        jobs = re.search(r"^total\s+(\d+)", done.stdout + done.stderr, re.M)
        print(
            f"{count} folders, {which} dry run: {seconds:.1f} s ({cpu:.1f} CPU s), "
            f"{jobs[1] if jobs else '?'} jobs",
            flush=True,
        )


if __name__ == "__main__":
    main()
