#!/usr/bin/env python3
"""Records the ids and logits that transformers 4 and lmdeploy have for fixed prompts, for check_parity.py."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from snaketune.common.cli import run
from snaketune.common.files import write_json
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Parses the command line, encodes, and writes one JSON file."""
    parser = argparse.ArgumentParser(
        description="Encode fixed prompts with tool calls using transformers' apply_chat_template and, if installed, "
        "lmdeploy's chat template and tokenizer, and compute their logits. Runs in the converter's environment. "
        "check_parity.py compares both with those of training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="Hugging Face or TurboMind folder with the tokenizer")
    parser.add_argument(
        "--hf", type=Path, help="Hugging Face folder to compute logits with (default: no logits)"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    add_settings(parser, "encode_prompts")
    args = parser.parse_args()

    from snaketune.chat_format.template_file import load_template
    from snaketune.parity.prompt_readers import (
        parity_prompts,
        read_logits,
        read_with_lmdeploy,
        read_with_transformers,
    )

    prompts = parity_prompts(args.prompts)
    readings = [read_with_transformers(args.model, prompts)]
    if importlib.util.find_spec("lmdeploy"):
        readings += read_with_lmdeploy(args.model, prompts, load_template(args.template), args.chat_template)
    logits = read_logits(args.hf, readings[0]["ids"], args.trust_remote_code) if args.hf else None
    write_json(args.output, {"format": 2, "prompts": prompts, "readings": readings, "logits": logits})
    print(f"{len(prompts)} prompts as read by {'; '.join(reading['reader'] for reading in readings)}")
    if logits is not None:
        print(f"logits: {logits['reader']} {logits['unread'] or 'loads the model'}")


if __name__ == "__main__":
    run(main)
