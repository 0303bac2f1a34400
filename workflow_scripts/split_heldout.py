"""Sets a seeded share of a dataset's conversations aside for evaluation, before anything is tokenised.

A line's content decides, not its place: duplicates fall on the same side, and a line that is added or removed moves
no other. Give tokenize_dataset.py the same share and seed: it leaves these lines out. A bad line is never set aside:
tokenize_dataset.py stops at it or quarantines it.
"""

from __future__ import annotations

import argparse

from snaketune.common.cli import UserError, run
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.settings.command_line import add_settings
from snaketune.tokenized.heldout_splitter import HeldoutSplitter, line_check


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--processed-dir", required=True, help="folder with <dataset>/processed/<any folder>/<file>.jsonl"
    )
    parser.add_argument(
        "--dataset",
        action="append",
        help="name of a dataset's folder; with --part it may be repeated or left out",
    )
    parser.add_argument(
        "--output-dir",
        required=True,
        help="receives <dataset>/processed/... with the lines that are set aside",
    )
    parser.add_argument(
        "--manifest",
        required=True,
        help="JSON file with the counts and hashes, with --part of the manifests; written last",
    )
    parser.add_argument(
        "--part", help="do this part of all datasets; their manifests go to <output-dir>/<dataset>.json"
    )
    add_settings(parser.add_argument_group("what to set aside"), "split_heldout", "heldout")
    same = parser.add_argument_group("what is a bad line: as tokenize_dataset.py has it")
    add_settings(same, "split_heldout", "data", "tokenize")
    same.add_argument(
        "--tokenizer-path", help="folder of the extended tokenizer; only --control-tokens error needs it"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check = line_check(ChatEncoding.from_options(vars(args)), args.max_length, args.tokenizer_path)
    splitter = HeldoutSplitter(args.processed_dir, args.output_dir, args.share, args.seed, check)
    if args.part:
        manifests = splitter.write_part(args.dataset, args.part, args.manifest)
    elif args.dataset and len(args.dataset) == 1:
        (name,) = args.dataset
        manifests = {name: splitter.write(name, args.manifest)}
    else:
        raise UserError("one --dataset is needed", found=args.dataset, fix="name it, or use --part")
    for name, manifest in manifests.items():
        totals = manifest["totals"]
        print(
            f"{name}: {totals['heldout']} of {totals['lines']} conversations set aside in {args.output_dir}"
            + (f", {totals['bad']} bad lines among them left where they are" if totals["bad"] else "")
        )


if __name__ == "__main__":
    run(main)
