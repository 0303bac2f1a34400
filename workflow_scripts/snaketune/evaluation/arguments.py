"""The command line that the scripts which evaluate a model have in common. Imports nothing heavy: `--help` is quick."""

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
    """Adds the model, its tokenizer, the held-out conversations, the file that is written and the script's settings."""
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
    parser.add_argument("--attention", default="auto", help="auto, sdpa, flash_attention_2 or another name")
    parser.add_argument(
        "--base-model",
        action="store_true",
        help="grow the embedding to the tokenizer as training does at its start",
    )
    parser.add_argument("--label", default=None, help="what the report calls it; default base or tuned")
    add_settings(parser, script)


def label_of(args: argparse.Namespace) -> str:
    """Returns what the report calls the model."""
    return args.label or ("base" if args.base_model else "tuned")


def encoding_record(tokenizer: ExtendedTokenizer, encoding: ChatEncoding) -> dict[str, str]:
    """Returns what an evaluation writes of the encoding; the template by the name that it has with the tokenizer."""
    return asdict(replace(encoding, template=tokenizer.template.name))


def model_sha256(args: argparse.Namespace) -> str | None:
    """Returns the digest of the model's configuration and weights; None for a name on the hub."""
    from snaketune.training.run_identity import base_model_digest

    cache = FingerprintCache(os.devnull)
    return base_model_digest(args.model, cache) if Path(args.model).is_dir() else None


def load_model(args: argparse.Namespace, tokenizer: ExtendedTokenizer):
    """Loads the model that the command line names, in eval mode. Takes the seconds that torch and transformers take."""
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
