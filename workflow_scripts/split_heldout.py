"""Sets aside a seeded share of a dataset's conversations for evaluation, before tokenisation.

The choice depends on a line's content, not its position: duplicates stay on the same side, and adding or
removing a line moves no other. Pass the same share and seed to tokenize_dataset.py, which leaves these lines
out. Bad lines are never set aside: tokenize_dataset.py stops at them or quarantines them.
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
        help="name of a dataset folder; with --part, may be repeated or omitted",
    )
    parser.add_argument(
        "--output-dir",
        required=True,
        help="receives <dataset>/processed/... with the held-out lines",
    )
    parser.add_argument(
        "--manifest",
        required=True,
        help="JSON file with the counts and hashes, or with --part the digests of the manifests; written last",
    )
    parser.add_argument(
        "--part", help="process this part of the datasets; their manifests go to <output-dir>/<dataset>.json"
    )
    add_settings(parser.add_argument_group("held-out share"), "split_heldout", "heldout")
    same = parser.add_argument_group("bad lines: same options as for tokenize_dataset.py")
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
        raise UserError(
            "exactly one --dataset is required", found=args.dataset, fix="name one dataset, or use --part"
        )
    for name, manifest in manifests.items():
        totals = manifest["totals"]
        print(
            f"{name}: {totals['heldout']} of {totals['lines']} conversations set aside in {args.output_dir}"
            + (f"; {totals['bad']} bad lines not set aside" if totals["bad"] else "")
        )


if __name__ == "__main__":
    run(main)
