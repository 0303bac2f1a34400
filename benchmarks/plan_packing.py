"""Times making and opening the pack plan of a million synthetic documents, in each mode.

    python benchmarks/plan_packing.py [--documents 1000000] [--files 100] [--max-length 32768]

Lengths are log-normal with a median of 300 tokens; one in a thousand is longer than a packed sequence. Only
the meta files have content; the `.bin` files have the right size but are empty.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "workflow_scripts"))
from snaketune.packing.pack_plan import MODES, open_plan
from snaketune.packing.planner import make_plan


def write_metas(folder: Path, documents: int, files: int, max_length: int) -> list[str]:
    """Writes meta files and returns the names of their `.bin` files."""
    rng = np.random.RandomState(0)
    names = [f"f{number:05}.bin" for number in range(files)]
    for name, part in zip(names, np.array_split(np.arange(documents), files), strict=True):
        lengths = np.clip(rng.lognormal(np.log(300), 1.2, len(part)).astype(np.int64), 2, max_length)
        lengths[rng.rand(len(part)) < 0.001] = max_length + 1000
        sizes = lengths * 6 + 16
        ends = np.cumsum(sizes)
        with open(folder / f"{name}.meta", "wb") as meta:
            np.save(meta, np.stack([ends - sizes, lengths], axis=1))
        with open(folder / name, "wb") as file:
            file.truncate(int(ends[-1]))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=32768)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_metas(folder, args.documents, args.files, args.max_length)
        print(f"{args.documents:,} documents in {args.files:,} files, rows of {args.max_length:,} tokens")
        for mode in MODES:
            start = time.perf_counter()
            plan = make_plan(folder, names, args.max_length, mode)
            planned = time.perf_counter()
            plan.write(folder / mode)
            written = time.perf_counter()
            opened = open_plan(folder / mode)
            ready = time.perf_counter()
            opened.row(int(opened.order(0)[len(opened) // 2]))
            sought = time.perf_counter()
            size = sum(path.stat().st_size for path in (folder / mode).iterdir())
            print(
                f"{mode:9} plan {planned - start:6.2f} s  write {written - planned:5.2f} s  open {ready - written:6.4f} s"
                f"  seek {(sought - ready) * 1e3:5.2f} ms  {len(plan):,} rows, waste"
                f" {plan.totals['waste']['share']:.4%}, {size / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    main()
