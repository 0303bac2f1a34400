"""Sets a seeded share of a dataset's conversations aside for evaluation, before anything is tokenised.

A line's content decides, not its place: duplicates fall on the same side, and a line that is added or removed moves
no other. Give tokenize_dataset.py the same share and seed: it leaves these lines out.
"""

from __future__ import annotations

import argparse

from common.cli import run
from ftdp.heldout import write_heldout


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--processed-dir", required=True, help="folder with <dataset>/processed/<any folder>/<file>.jsonl"
    )
    parser.add_argument("--dataset", required=True, help="name of the dataset's folder")
    parser.add_argument(
        "--output-dir",
        required=True,
        help="receives <dataset>/processed/... with the lines that are set aside",
    )
    parser.add_argument(
        "--manifest", required=True, help="JSON file with the counts and hashes; written last"
    )
    parser.add_argument("--share", type=float, default=0.05, help="share of the lines, 0 <= share < 1")
    parser.add_argument("--seed", type=int, default=1024, help="another seed sets other lines aside")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    manifest = write_heldout(
        args.processed_dir, args.dataset, args.output_dir, args.manifest, args.share, args.seed
    )
    totals = manifest["totals"]
    print(
        f"{args.dataset}: {totals['heldout']} of {totals['lines']} conversations set aside in {args.output_dir}"
    )


if __name__ == "__main__":
    run(main)
