#!/usr/bin/env python3
"""Computes the digests behind results again and says what no longer matches."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run


def main() -> int:
    """Parses the command line and verifies; returns 1 where something does not match."""
    parser = argparse.ArgumentParser(
        description="Read every file behind a result again, and say which are not what its records say: changed, or gone. "
        "Exits with 1 then."
    )
    parser.add_argument(
        "path",
        type=Path,
        help="a results folder (all its finished runs), or one file or folder that the workflow made",
    )
    args = parser.parse_args()

    from snaketune.provenance.record import Record
    from snaketune.provenance.records import is_results, lineage, run_records
    from snaketune.provenance.tree import verify

    whole = is_results(args.path)
    record = Record("results", sources=list(run_records(args.path).values())) if whole else lineage(args.path)
    count, wrong = verify(record)
    for each in wrong:
        found = "gone" if each.found is None else each.found[:12]
        print(
            f"does not match: {each.check.what}\n  recorded: {each.check.recorded[:12]}\n  found:    {found}"
        )
    print(
        f"{count} digests computed, {len(wrong)} of them no longer match"
        if wrong
        else f"{count} digests match"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    run(main)
