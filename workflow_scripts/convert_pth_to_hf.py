#!/usr/bin/env python3
"""Converts a training checkpoint to a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Parses the command line and converts."""
    parser = argparse.ArgumentParser(
        description="Convert a DeepSpeed checkpoint (any ZeRO stage, or weights only) to a Hugging Face folder with "
        "safetensors, tokenizer and generation config, readable by transformers 4 and 5 and by lmdeploy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage="%(prog)s [options] config pth dst\n       %(prog)s [options] --run RUN dst",
    )
    parser.add_argument(
        "config", type=Path, nargs="?", help="the training config (names the base model and the tokenizer)"
    )
    parser.add_argument(
        "pth",
        type=Path,
        nargs="?",
        help="an iter_N.pth, a run folder (uses its newest complete checkpoint), or a run's train.json",
    )
    parser.add_argument("dst", type=Path, help="folder to write; replaced if it exists")
    parser.add_argument(
        "--run",
        type=Path,
        help="instead of config and pth: results/<run> or a run folder; uses its newest complete checkpoint, even while "
        "training is running",
    )
    add_settings(parser, "convert_pth_to_hf")
    args = parser.parse_intermixed_args()
    if (args.run is None) != (args.pth is not None):
        parser.error("pass config, pth and dst, or --run and dst")

    from snaketune.export.checkpoint_source import find_run
    from snaketune.export.hf_convert import convert

    config, pth = (args.config, args.pth) if args.run is None else find_run(args.run)
    manifest = convert(
        config,
        pth,
        args.dst,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        trust_remote_code=args.trust_remote_code,
        lora=args.lora,
        padded_vocab=args.padded_vocab,
    )
    print(
        f"wrote {args.dst}: {manifest['architecture']}, {manifest['parameters']:,} parameters, {manifest['dtype']}, "
        f"{manifest['vocab_size']} rows, from {manifest['checkpoint']}"
    )


if __name__ == "__main__":
    run(main)
