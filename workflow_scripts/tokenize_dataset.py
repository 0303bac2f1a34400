"""Tokenises chat data in the ftdp layout, byte for byte as XTuner 0.2.0's tokenize_ftdp_datasets.py does.

Reads <processed-dir>/<dataset>/processed/<any folder>/<file>.jsonl, writes
<tokenized-dir>/chatml_llamav13_32k/{train,valid}/cn/<dataset>/<file>.bin and .bin.meta and, last, one manifest a
dataset. With --tokenizer-w-special-tokens-save-dir the chat tokens that the tokenizer lacks are added first, and the
extended tokenizer is saved there: train with that one. A run that was stopped is simply started again.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from typing import Any

from common.cli import UserError, run
from ftdp.base_tokenizer import open_tokenizer
from ftdp.block_tokenizer import TokenizeOptions
from ftdp.chat_template import MAX_LENGTH
from ftdp.planning import DEFAULT_BATCH_BYTES, DEFAULT_SHARD_BYTES, MEGABYTE
from ftdp.tokenizing import merge_parts, tokenize_datasets, tokenize_part
from ftdp.workers import available_cpus


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
        help="folder with tokenizer.json or tokenizer.model, such a file, or a hub name",
    )
    parser.add_argument(
        "--tokenizer-w-special-tokens-save-dir",
        help="folder that receives the tokenizer with the chat tokens; needed when the base lacks one",
    )
    parser.add_argument(
        "--dataset", action="append", help="name of a dataset folder; may be repeated; all of them by default"
    )
    parser.add_argument(
        "--max-length", type=int, default=MAX_LENGTH, help="tokens after which a conversation is cut"
    )
    parser.add_argument(
        "--heldout-share",
        type=float,
        default=0.0,
        help="share of the lines to leave out because split_heldout.py sets them aside",
    )
    parser.add_argument(
        "--heldout-seed", type=int, default=1024, help="the seed that split_heldout.py was given"
    )
    add_option_flags(parser)
    add_part_flags(parser)
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cpus(),
        help="worker processes; the bytes do not depend on it",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the base tokenizer's own code if it has no tokenizer.json (only for models that you trust)",
    )
    return parser.parse_args()


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of masks, templates, the valid folder and bad lines; each is a field of `TokenizeOptions`."""
    default = TokenizeOptions()
    parser.add_argument(
        "--template",
        default=default.template,
        help="chat template: a shipped name, or a path to a template file",
    )
    parser.add_argument(
        "--mask",
        choices=("compat", "exact"),
        default=default.mask,
        help="which tokens are trained on: compat as XTuner, exact without its faults",
    )
    parser.add_argument(
        "--control-tokens",
        choices=("literal", "control", "error"),
        default=default.control_tokens,
        help="a control token typed inside a message: as ordinary text, as the token (XTuner), or refused",
    )
    parser.add_argument(
        "--valid",
        choices=("copy", "holdout"),
        default=default.valid,
        help="valid folder: copies of every 100th sample (XTuner), or a share moved out of training",
    )
    parser.add_argument(
        "--valid-share", type=float, default=default.valid_share, help="share that --valid holdout moves"
    )
    parser.add_argument("--valid-seed", type=int, default=default.valid_seed, help="seed of that choice")
    parser.add_argument(
        "--on-bad-sample",
        choices=("stop", "quarantine"),
        default=default.on_bad_sample,
        help="a bad line: stop, or move it unchanged to manifests/<dataset>/<file>.quarantine.jsonl and go on",
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=default.max_bad_share,
        help="share of a file's lines above which quarantine fails too",
    )


def add_part_flags(parser: argparse.ArgumentParser) -> None:
    """The flags with which a scheduler runs the work as several jobs."""
    parser.add_argument(
        "--part", help="do only this part of the plan, and write no manifest (a wrong name lists them)"
    )
    parser.add_argument("--marker", help="with --part: JSON file that is written last, what the part was")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="tokenise nothing: join what parts have done, and write the manifests",
    )
    parser.add_argument(
        "--index", help="with --merge: JSON file that is written last, a digest of each manifest"
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="with --merge: remove datasets from the tokenised folder that are not asked for",
    )
    parser.add_argument(
        "--shard-mb",
        type=int,
        default=DEFAULT_SHARD_BYTES // MEGABYTE,
        help="megabytes after which a JSONL file is split; the bytes do not depend on it",
    )
    parser.add_argument(
        "--batch-mb",
        type=int,
        default=DEFAULT_BATCH_BYTES // MEGABYTE,
        help="with --part: megabytes of small files in one part",
    )


def options_of(args: argparse.Namespace) -> TokenizeOptions:
    """Returns the options that the flags say."""
    return TokenizeOptions(**{field.name: getattr(args, field.name) for field in fields(TokenizeOptions)})


def summary(manifest: dict[str, Any]) -> str:
    """Returns what to say of a dataset: two lines, the second of what `docs/masks.md` explains."""
    totals, counts, options = manifest["totals"], manifest["counts"], manifest["options"]
    first = (
        f"{manifest['dataset']}: {totals['samples']} samples, {totals['tokens']} tokens "
        f"({100 * manifest['trained_share']:.1f}% trained on), {totals['truncated']} cut, "
        f"{totals['heldout']} held out"
    )
    if totals["quarantined"]:
        first += f", {totals['quarantined']} quarantined"
    second = f"  mask {options['mask']}: {counts['straddling_messages']} messages straddle a border"
    if options["mask"] == "exact":
        second += f", {counts['tokens_differing_from_compat']} tokens differ from compat"
    second += f"; {counts['control_messages']} messages hold a control token ({options['control_tokens']})"
    return f"{first}\n{second}"


def main() -> None:
    args = parse_args()
    for name in ("threads", "shard_mb", "batch_mb"):
        if getattr(args, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is out of range", found=getattr(args, name), expected="1 or more")
    # The worker processes are the parallelism: no threads of the tokenizers library beside them.
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
    for manifest in manifests.values():
        print(summary(manifest))


if __name__ == "__main__":
    run(main)
