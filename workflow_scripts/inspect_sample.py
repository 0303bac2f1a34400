"""Prints a sample of a tokenised file: what is trained on, what is masked, which special tokens it holds.

In a terminal in colour; elsewhere, and where NO_COLOR is set, what is trained on stands in [+ and +], a special token in
[= and =]. In the workflow's results the tokenizer is found by itself.
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
    parser.add_argument("bin", type=Path, help="the .bin file; its .bin.meta lies beside it")
    parser.add_argument("number", type=int, help="which sample, from 0; -1 is the last one")
    parser.add_argument(
        "--tokenizer-path", type=Path, help="folder of the extended tokenizer (default: looked for)"
    )
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="auto: in a terminal only"
    )
    parser.add_argument("--ids", action="store_true", help="list the tokens one by one, with their ids")
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
    # A terminal that cannot show a character must not end the print.
    sys.stdout.reconfigure(errors="backslashreplace")
    print("\n".join(sample.summary()))
    print(legend(colour), end="\n\n")
    print(token_table(sample) if args.ids else paint(sample, colour))


if __name__ == "__main__":
    run(main)
