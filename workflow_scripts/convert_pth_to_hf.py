#!/usr/bin/env python3
"""Converts a training checkpoint to a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.cli import run
from export.hf_folder import parse_size


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
        help="an iter_N.pth, a run folder (its newest whole checkpoint), or a run's train.json",
    )
    parser.add_argument("dst", type=Path, help="folder to make; replaced as a whole if it exists")
    parser.add_argument(
        "--run",
        type=Path,
        help="instead of config and pth: results/<run> or a run folder, also of a training that goes on; its newest "
        "whole checkpoint is taken",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="type of the saved weights; auto: what the model was trained in",
    )
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default="2GB",
        help="size at which a new safetensors file is begun",
    )
    parser.add_argument(
        "--padded-vocab",
        choices=("keep", "trim"),
        default="keep",
        help="rows of the vocabulary that no token has: kept as trained, or left out",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the base model"
    )
    parser.add_argument(
        "--lora",
        choices=("merge", "adapter"),
        default="merge",
        help="of a LoRA run: merge writes a model like any other, adapter also the adapter, in dst/adapter",
    )
    args = parser.parse_intermixed_args()
    if (args.run is None) != (args.pth is not None):
        parser.error("give config, pth and dst, or --run and dst")

    from export.checkpoint_source import find_run
    from export.hf import convert

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
