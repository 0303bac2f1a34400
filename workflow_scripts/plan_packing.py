"""Makes a pack plan: which slices of documents go into which packed sequence (row), and the row order.

The trainer follows the plan and makes no decisions itself. Reads only the `.bin.meta` files and the
manifests. Refuses files that were tokenised with different tokenizers, templates or options, and files of
unfinished datasets. docs/packing.md explains how the rows are made and the counts in plan.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run
from snaketune.common.fingerprints import FingerprintCache
from snaketune.packing.planner import make_plan
from snaketune.settings.command_line import add_settings
from snaketune.tokenized.bin_digests import bin_digests
from snaketune.tokenized.compatibility import UNKNOWN, made_with
from snaketune.tokenized.data_order import find_train_folder, list_train_files, read_data_order
from snaketune.tokenized.manifests import Manifests
from snaketune.tokenized.stats import untrained_warning


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--train-folder",
        required=True,
        help="<tokenized-dir>/chatml_llamav13_32k/train, or a folder above it",
    )
    add("--data-order", type=Path, help="data_order.txt (default: list the folder)")
    add_settings(parser, "plan_packing")
    add(
        "--epochs",
        type=int,
        default=1,
        help="number of epochs whose row order is stored; later epochs follow from the seed",
    )
    add("--min-length", type=int, default=0, help="leave out documents with fewer tokens")
    add(
        "--processed-dir",
        type=Path,
        help="folder of the JSONL files, recorded for trace_step.py",
    )
    add("--output", type=Path, required=True, help="plan folder to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    train_folder = find_train_folder(args.train_folder)
    names = read_data_order(args.data_order) if args.data_order else list_train_files(train_folder)
    cache = FingerprintCache(args.output.parent / ".digests.json")
    made = made_with(train_folder, names)
    digests = bin_digests(train_folder, names, cache)
    cache.save()
    plan = make_plan(
        train_folder,
        names,
        args.max_length,
        args.mode,
        args.seed,
        epochs=args.epochs,
        min_length=args.min_length,
        bin_sha256=digests,
        made_with=made,
        processed_dir=args.processed_dir,
        weights=dict(args.weight or ()),
    )
    manifest = plan.write(args.output)
    totals = manifest["totals"]
    waste, cut = totals["waste"], totals["cut"]
    lost = [
        f"{value['documents']:,} documents, {value['tokens']:,} tokens ({reason})"
        for reason, value in totals["dropped"].items()
        if value["tokens"] or value["documents"]
    ]
    if made is None:
        print(f"notice: {train_folder} has {UNKNOWN}")
    print(f"{args.output}: mode {args.mode}, plan {manifest['plan_sha256'][:12]}")
    print(
        f"  packed   {totals['documents']:,} documents, {totals['packed_tokens']:,} of {totals['tokens']:,} tokens"
    )
    least = (
        "the fewest possible"
        if totals["rows"] == totals["least_rows"]
        else f"at least {totals['least_rows']:,}"
    )
    print(
        f"  rows     {totals['rows']:,} ({least}) of up to {args.max_length:,} tokens, {waste['tokens']:,} unused ({waste['share']:.3%})"
    )
    print(f"  cut      {cut['documents']:,} documents, into {cut['pieces']:,} slices")
    if severed := cut["tokens_without_beginning"]:
        print(
            f"warning: {severed:,} tokens ({severed / totals['packed_tokens']:.1%}) are trained without the beginning of their"
            f" document; a conversation should not be longer than --max-length (data.max_tokens cuts it instead)"
        )
    manifests = Manifests()
    entries = filter(None, (manifests.of(train_folder / name) for name in names))
    for path in dict.fromkeys(entry.path for entry in entries):
        if warning := untrained_warning(path):
            print(warning)
    print(f"  dropped  {'; '.join(lost) or 'nothing'}")
    for name, each in totals.get("mixture", {}).items():
        seen, out = each["seen"], each["left_out"]
        print(
            f"  weight   {each['weight']:g} of {name}: {each['documents']:,} documents, seen {seen['documents']:,} times in all,"
            f" {seen['tokens']:,} tokens; {out['documents']:,} documents, {out['tokens']:,} tokens left out"
        )


if __name__ == "__main__":
    run(main)
