"""Converts chat data in common formats to the processed ftdp layout, ready for tokenize_dataset.py.

Reads OpenAI messages (with tools, tool_calls and their results), ShareGPT (with function_call and observation), Alpaca
and ftdp, from .json, .jsonl, .jsonl.gz, .jsonl.zst and .parquet files of any size. Writes
<processed-dir>/<dataset>/processed/sft_chat/<file>.jsonl and, last, <processed-dir>/<dataset>/ingest.json, which
accounts for every row.
"""

from __future__ import annotations

import argparse

from snaketune.common.cli import run
from snaketune.ingest.formats import FORMATS
from snaketune.ingest.ingesting import IngestOptions, ingest
from snaketune.settings.command_line import add_settings


def parse_args() -> argparse.Namespace:
    default = IngestOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        help="files, or folders to search for .json, .jsonl, .ndjson (plain, .gz or .zst) and .parquet",
    )
    parser.add_argument("--processed-dir", required=True, help="folder that receives <dataset>/")
    parser.add_argument("--dataset", required=True, help="name of the dataset to write")
    parser.add_argument(
        "--format",
        choices=("auto", *FORMATS),
        default=default.format,
        help="format of the rows; auto detects it from the keys of each row",
    )
    parser.add_argument(
        "--arguments-key",
        choices=("parameters", "arguments"),
        default=default.arguments_key,
        help="key of a tool call's arguments in the result: `parameters` as in InternLM2, or `arguments` as in OpenAI",
    )
    add_settings(parser, "ingest_dataset")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    options = IngestOptions(args.format, args.arguments_key, args.on_bad_sample, args.max_bad_share)
    manifest = ingest(args.input, args.processed_dir, args.dataset, options)
    totals = manifest["totals"]
    print(
        f"{args.dataset}: {totals['samples']:,} conversations of {totals['rows']:,} rows, "
        f"{totals['quarantined']:,} bad rows quarantined"
    )


if __name__ == "__main__":
    run(main)
