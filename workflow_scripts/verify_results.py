#!/usr/bin/env python3
"""Recomputes the digests behind results and reports mismatches."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run


def main() -> int:
    """Parses the command line and verifies. Returns 1 if something does not match."""
    parser = argparse.ArgumentParser(
        description="Read every file behind a result again and report those that changed or are missing, according to its "
        "records. Exits with code 1 if there are any."
    )
    parser.add_argument(
        "path",
        type=Path,
        help="a results folder (all its finished runs), or one file or folder made by the workflow",
    )
    args = parser.parse_args()

    from snaketune.provenance.record import Record
    from snaketune.provenance.records import is_results, lineage, run_records
    from snaketune.provenance.tree import verify

    whole = is_results(args.path)
    record = Record("results", sources=list(run_records(args.path).values())) if whole else lineage(args.path)
    count, wrong = verify(record)
    for each in wrong:
        found = "missing" if each.found is None else each.found[:12]
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
