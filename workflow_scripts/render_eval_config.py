#!/usr/bin/env python3
"""Writes the OpenCompass config of one model, in the form of the guide's step 7."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run
from snaketune.common.files import read_json, write_text
from snaketune.opencompass.eval_config import EvalSettings
from snaketune.opencompass.groups import GROUPS
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Parses the command line and writes the config."""
    parser = argparse.ArgumentParser(
        description="Write a config for OpenCompass 0.5.4: groups of public datasets and your own datasets, the model with "
        "the chat template and stop words used in training, and how tasks are started.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="Python file to write")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model, for the backend")
    parser.add_argument("--tokenizer-path", required=True, help="folder of the extended tokenizer")
    parser.add_argument("--abbr", required=True, help="name of the model")
    parser.add_argument(
        "--train-manifest", type=Path, required=True, help="train.json, which names the checkpoint"
    )
    add_settings(parser, "render_eval_config")
    args = parser.parse_args()

    from snaketune.encoding.tokenizer import load_tokenizer
    from snaketune.opencompass.eval_config import render_eval_config

    given = vars(args)
    output, tokenizer, train = (given.pop(key) for key in ("output", "tokenizer_path", "train_manifest"))
    given["iteration"] = Path(read_json(train)["checkpoint"]).stem
    given["custom"] = {name: Path(path) for name, path in args.custom}
    write_text(output, render_eval_config(EvalSettings(**given), load_tokenizer(tokenizer)))
    for name in args.groups:
        if GROUPS[name].opt_in:
            print(f"note: {name} does not run as OpenCompass 0.5.4 ships it: {GROUPS[name].opt_in}")
    print(f"wrote {output}")


if __name__ == "__main__":
    run(main)
