#!/usr/bin/env python3
"""Prints two tool-call evaluations side by side, with intervals and paired differences."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run
from snaketune.common.files import read_json, write_json


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(
        description="Compare two models by their evaluate_tool_calls.py results. Each figure has a 95% interval; the "
        "difference is tuned - base on the same draws of conversations. Losses are in nats per token."
    )
    parser.add_argument("base", type=Path, help="JSON file of the base model")
    parser.add_argument("tuned", type=Path, help="JSON file of the tuned model")
    parser.add_argument("--output", type=Path, help="also write the rows to this JSON file")
    args = parser.parse_args()

    from snaketune.reporting.tool_call_tables import comparison_rows, perplexity

    rows = comparison_rows(read_json(args.base), read_json(args.tuned))
    if args.output:
        write_json(args.output, rows)
    group = None
    for row in rows:
        if (row["scope"], row["name"]) != group:
            group = row["scope"], row["name"]
            print(f"\n{' '.join(group)}")
            print(f"  {'':22} {'count':>8}  {'base':26} {'tuned':26} tuned - base")
        columns = "".join(f"{_shown(row[key]):27}" for key in ("base", "tuned", "difference"))
        print(f"  {row['metric']:22} {row['count']:8}  {columns}".rstrip())
        if row["metric"].startswith("loss."):
            both = "".join(f"{_shown(perplexity(row[key]), 2):27}" for key in ("base", "tuned"))
            print(f"  {'  perplexity':22} {'':8}  {both}".rstrip())


def _shown(interval, digits: int = 3) -> str:
    value, low, high = interval
    if value is None:
        return "-"
    bounds = "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{bounds}"


if __name__ == "__main__":
    run(main)
