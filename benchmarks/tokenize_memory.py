"""Prints the peak memory of tokenising a set of conversations and a set ten times as large, for both masks.

Memory is the proportional set size of the command and its worker processes. Exits with 1 if ten times the
data need more than --allowed times the memory.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from measuring import MemoryPeak
from repeated_conversations import repeat_files

REPO = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    data = REPO.parent / "shared/data"
    parser.add_argument("--processed-dir", type=Path, default=data / "ftdp", help="ftdp layout")
    parser.add_argument("--tokenizer-path", type=Path, default=data / "mistral_v1_tokenizer")
    parser.add_argument("--megabytes", type=float, default=5, help="size of the smaller set")
    parser.add_argument("--threads", type=int, default=2, help="worker processes")
    parser.add_argument("--allowed", type=float, default=1.1, help="fail above this ratio of the peaks")
    parser.add_argument(
        "--work-dir", type=Path, default=REPO / "build/tokenize_memory", help="emptied at the start"
    )
    args = parser.parse_args()
    shutil.rmtree(args.work_dir, ignore_errors=True)
    sizes = (args.megabytes, 10 * args.megabytes)
    for size in sizes:
        repeat_files(args.processed_dir, args.work_dir / f"processed_{size:g}", size)
    ratios = []
    for mask in ("compat", "exact"):
        small, large = (measure(args, size, mask) for size in sizes)
        ratios.append(large / small)
        print(
            f"mask {mask}: {small:.0f} MB for {sizes[0]:g} MB of data, {large:.0f} MB for {sizes[1]:g} MB, ",
            end="",
        )
        print(f"{large / small:.2f} times", flush=True)
    sys.exit(max(ratios) > args.allowed)


def measure(args: argparse.Namespace, size: float, mask: str) -> float:
    """Tokenises one of the sets; returns the peak memory in MB."""
    output = args.work_dir / f"{mask}_{size:g}"
    command = [sys.executable, REPO / "workflow_scripts/tokenize_dataset.py", "--threads", args.threads]
    command += ["--mask", mask, "--processed-dir", args.work_dir / f"processed_{size:g}"]
    command += ["--tokenized-dir", output / "tokenized", "--tokenizer-path", args.tokenizer_path]
    command += ["--tokenizer-w-special-tokens-save-dir", output / "tokenizer"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = MemoryPeak(process.pid)
    _, error = process.communicate()
    if process.returncode:
        sys.exit(error.decode(errors="replace")[-2000:])
    return peak.stop() / 1e6


if __name__ == "__main__":
    main()
