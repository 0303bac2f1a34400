"""Prints a document of a tokenised file with its trained text, masked text and special tokens.

Uses colour in a terminal. Elsewhere, or if NO_COLOR is set, [+ +] mark trained text and [= =] special tokens.
In the workflow's results, the tokenizer is found automatically.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from snaketune.common.cli import run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("bin", type=Path, help="the .bin file, with its .bin.meta beside it")
    parser.add_argument("number", type=int, help="number of the document, from 0; -1 is the last")
    parser.add_argument(
        "--tokenizer-path",
        type=Path,
        help="folder of the extended tokenizer (default: found in the workflow's results)",
    )
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="auto: only in a terminal"
    )
    parser.add_argument("--ids", action="store_true", help="list the tokens with their ids")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from snaketune.encoding.tokenizer import load_tokenizer
    from snaketune.tokenized.compatibility import refuse_other_tokenizer
    from snaketune.tokenized.manifests import Manifests
    from snaketune.tokenized.sample_view import Sample, find_tokenizer, legend, paint, token_table

    entry = Manifests().of(args.bin)
    folder = args.tokenizer_path or find_tokenizer(args.bin, entry)
    tokenizer = load_tokenizer(folder)
    refuse_other_tokenizer(args.bin, entry and entry.manifest, folder, tokenizer.sha256)
    sample = Sample(args.bin, args.number, tokenizer)
    in_terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    colour = args.color == "always" or (args.color == "auto" and in_terminal)
    # Do not fail on characters that the terminal cannot show.
    sys.stdout.reconfigure(errors="backslashreplace")
    print("\n".join(sample.summary()))
    print(legend(colour), end="\n\n")
    print(token_table(sample) if args.ids else paint(sample, colour))


if __name__ == "__main__":
    run(main)
