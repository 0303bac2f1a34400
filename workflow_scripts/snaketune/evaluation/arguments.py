"""Command-line arguments shared by the evaluation scripts. No heavy imports, so that `--help` stays fast."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path

from snaketune.common.fingerprints import FingerprintCache
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.settings.command_line import add_settings


def add_model_arguments(parser: argparse.ArgumentParser, script: str) -> None:
    """Adds the model, its tokenizer, the held-out folder, the output file and the script's settings."""
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--tokenizer-path", required=True, help="folder of the extended tokenizer")
    parser.add_argument(
        "--heldout-dir",
        type=Path,
        required=True,
        help="conversations as <dataset>/processed/<any>/<file>.jsonl",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument(
        "--base-model",
        action="store_true",
        help="grow the embedding to the tokenizer's size, as training does before its first step",
    )
    parser.add_argument(
        "--label", default=None, help="the model's name in the report; default: base or tuned"
    )
    add_settings(parser, script)


def label_of(args: argparse.Namespace) -> str:
    """Returns the model's name in the report."""
    return args.label or ("base" if args.base_model else "tuned")


def encoding_record(tokenizer: ExtendedTokenizer, encoding: ChatEncoding) -> dict[str, str]:
    """Returns the encoding as evaluations record it, with the template named as in the tokenizer."""
    return asdict(replace(encoding, template=tokenizer.template.name))


def model_sha256(args: argparse.Namespace) -> str | None:
    """Returns the digest of the model's configuration and weights; None for a hub name."""
    from snaketune.training.run_identity import base_model_digest

    cache = FingerprintCache(os.devnull)
    return base_model_digest(args.model, cache) if Path(args.model).is_dir() else None


def load_model(args: argparse.Namespace, tokenizer: ExtendedTokenizer):
    """Loads the given model in eval mode. Importing torch and transformers takes seconds."""
    from snaketune.evaluation.models import load_for_evaluation

    return load_for_evaluation(
        args.model,
        args.tokenizer_path,
        tokenizer,
        base=args.base_model,
        dtype=args.dtype,
        attention=args.attention,
        trust_remote_code=args.trust_remote_code,
    )
