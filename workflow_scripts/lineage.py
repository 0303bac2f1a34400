#!/usr/bin/env python3
"""Prints the lineage of a result as a tree, from a score back to the JSONL files."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run


def main() -> None:
    """Parses the command line and prints the tree."""
    parser = argparse.ArgumentParser(
        description="Print the lineage of a result: the checkpoint, the pack plan, the tokenised shards, the JSONL files "
        "with line counts and digests, the tokenizer, configs, versions, git commit and Slurm jobs."
    )
    parser.add_argument(
        "file", type=Path, help="a file or folder made by the workflow, such as results/demo/report.html"
    )
    args = parser.parse_args()

    from snaketune.provenance.records import lineage
    from snaketune.provenance.tree import tree_lines

    print("\n".join(tree_lines(lineage(args.file))))


if __name__ == "__main__":
    run(main)
