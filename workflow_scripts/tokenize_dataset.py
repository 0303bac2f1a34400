"""Tokenises chat data in the ftdp layout, byte for byte as XTuner 0.2.0's tokenize_ftdp_datasets.py does.

Reads <processed-dir>/<dataset>/processed/<any folder>/<file>.jsonl. Writes
<tokenized-dir>/chatml_llamav13_32k/{train,valid}/cn/<dataset>/<file>.bin and .bin.meta and, last, one
manifest per dataset. With --tokenizer-w-special-tokens-save-dir, first adds the chat tokens that the
tokenizer lacks and saves the extended tokenizer there; train with that tokenizer. If the command was stopped,
start it again to continue.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from typing import Any

from snaketune.common.cli import UserError, run
from snaketune.common.worker_pool import available_cpus
from snaketune.encoding.base_tokenizer import open_tokenizer
from snaketune.settings.command_line import add_settings
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.job_parts import MEGABYTE
from snaketune.tokenized.layout import manifest_path
from snaketune.tokenized.stats import untrained_warning
from snaketune.tokenized.tokenizing import merge_parts, tokenize_datasets, tokenize_part


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--processed-dir", required=True, help="folder with <dataset>/processed/<any folder>/<file>.jsonl"
    )
    parser.add_argument("--tokenized-dir", required=True, help="receives chatml_llamav13_32k/ and manifests/")
    parser.add_argument(
        "--tokenizer-path",
        required=True,
        help="folder with tokenizer.json or tokenizer.model, one of these files, or a hub name",
    )
    parser.add_argument(
        "--tokenizer-w-special-tokens-save-dir",
        help="receives the tokenizer with the chat tokens; required if the base lacks any",
    )
    parser.add_argument(
        "--dataset", action="append", help="name of a dataset folder; may be repeated (default: all)"
    )
    add_settings(parser, "tokenize_dataset")
    add_part_flags(parser)
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cpus(),
        help="worker processes; does not change the output",
    )
    return parser.parse_args()


def add_part_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for running the work as several jobs."""
    parser.add_argument(
        "--part", help="process only this part and write no manifest (an unknown name lists the parts)"
    )
    parser.add_argument("--marker", help="with --part: JSON file that lists the part's chunks; written last")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="tokenise nothing; join the results of the parts and write the manifests",
    )
    parser.add_argument(
        "--index", help="with --merge: JSON file with a digest of each manifest; written last"
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="with --merge: remove datasets from the tokenised folder that are not requested",
    )


def options_of(args: argparse.Namespace) -> TokenizeOptions:
    """Returns the options set by the flags."""
    return TokenizeOptions(**{field.name: getattr(args, field.name) for field in fields(TokenizeOptions)})


def summary(manifest: dict[str, Any]) -> str:
    """Returns a summary of a dataset in two lines; docs/masks.md explains the second."""
    totals, counts, options = manifest["totals"], manifest["counts"], manifest["options"]
    first = (
        f"{manifest['dataset']}: {totals['samples']} documents, {totals['tokens']} tokens "
        f"({100 * manifest['trained_share']:.1f}% trained on), {totals['truncated']} cut, "
        f"{totals['heldout']} held out"
    )
    if totals["quarantined"]:
        first += f", {totals['quarantined']} quarantined"
    second = f"  mask {options['mask']}: {counts['straddling_messages']} messages straddle a boundary"
    if options["mask"] == "exact":
        second += f", {counts['tokens_differing_from_compat']} tokens differ from compat"
    second += f"; {counts['control_messages']} messages hold a control token ({options['control_tokens']})"
    return f"{first}\n{second}"


def main() -> None:
    args = parse_args()
    if args.threads < 1:
        raise UserError("--threads is out of range", found=args.threads, expected="1 or more")
    # The worker processes already run in parallel, so disable the threads of the tokenizers library.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = open_tokenizer(
        args.tokenizer_path, args.tokenizer_w_special_tokens_save_dir, args.trust_remote_code, args.template
    )
    folders = (args.processed_dir, args.tokenized_dir, tokenizer, options_of(args))
    shard_bytes, batch_bytes = args.shard_mb * MEGABYTE, args.batch_mb * MEGABYTE
    if args.part:
        status = tokenize_part(
            *folders,
            args.part,
            datasets=args.dataset,
            marker=args.marker,
            processes=args.threads,
            shard_bytes=shard_bytes,
            batch_bytes=batch_bytes,
        )
        print(f"{args.part}: {status}")
        return
    if args.merge:
        manifests = merge_parts(*folders, datasets=args.dataset, index=args.index, prune=args.prune)
    else:
        manifests = tokenize_datasets(
            *folders,
            datasets=args.dataset,
            processes=args.threads,
            shard_bytes=shard_bytes,
        )
    for name, manifest in manifests.items():
        print(summary(manifest))
        if warning := untrained_warning(manifest_path(args.tokenized_dir, name)):
            print(warning)


if __name__ == "__main__":
    run(main)
