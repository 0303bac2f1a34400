#!/usr/bin/env python3
"""Compares finished runs on one HTML page, with intervals for the differences from the first run."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run
from snaketune.common.files import write_json, write_text
from snaketune.common.run_files import RunFiles


def main() -> None:
    """Parses the command line, compares, and writes the page and its figures."""
    parser = argparse.ArgumentParser(
        description="Compare finished runs on one self-contained HTML page, in English and Chinese: overlaid loss curves; "
        "held-out loss and tool calls with paired differences from the first run and 95% intervals; the settings that "
        "differ; the cost."
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        help="folders of the runs, such as results/demo; the first is the baseline",
    )
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument(
        "--json", type=Path, required=True, help="JSON file to write, with every figure on the page"
    )
    parser.add_argument(
        "--benchmarks", type=Path, help="folder of Snakemake's benchmark files; shows the cost"
    )
    parser.add_argument(
        "--shared-names",
        nargs="+",
        default=(),
        help="names of the shared data and tokenizers in the benchmark folder",
    )
    args = parser.parse_args()

    from snaketune.reporting.comparison_page import render_comparison
    from snaketune.reporting.run_comparison import compare

    runs = [RunFiles(folder) for folder in args.runs]
    comparison = compare(runs, args.benchmarks, args.shared_names)
    page = render_comparison(comparison, [each.metrics for each in runs])
    write_json(args.json, comparison)
    write_text(args.output, page)
    for each in comparison["refused"]:
        print(
            f"notice: {each['run']}: {each['evaluation']} is not compared because {', '.join(each['differs'])} differ"
        )
    print(
        f"wrote {args.output} ({len(page) // 1024} KiB), {len(runs)} runs, baseline {comparison['baseline']}"
    )


if __name__ == "__main__":
    run(main)
