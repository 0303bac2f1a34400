#!/usr/bin/env python3
"""Records the ids that transformers and lmdeploy encode fixed prompts to, for check_parity.py."""

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
        "lmdeploy's chat template and tokenizer. Runs in the converter's environment. check_parity.py compares the ids "
        "with those of training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="Hugging Face or TurboMind folder with the tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    add_settings(parser, "encode_prompts")
    args = parser.parse_args()

    from snaketune.chat_format.template_file import load_template
    from snaketune.export.prompt_readers import parity_prompts, read_with_lmdeploy, read_with_transformers

    prompts = parity_prompts(args.prompts)
    readings = [read_with_transformers(args.model, prompts)]
    if importlib.util.find_spec("lmdeploy"):
        readings += read_with_lmdeploy(args.model, prompts, load_template(args.template), args.chat_template)
    write_json(args.output, {"format": 1, "prompts": prompts, "readings": readings})
    print(f"{len(prompts)} prompts as read by {'; '.join(reading['reader'] for reading in readings)}")


if __name__ == "__main__":
    run(main)
