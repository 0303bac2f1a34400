"""Writes a training config: an mmengine Python config to read, copy, edit and pass to train_model.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import UserError, run
from snaketune.common.files import write_bytes, write_text
from snaketune.settings.command_line import add_settings, script_flags


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="config to write")
    add = parser.add_argument_group("model and data").add_argument
    add("--model-path", help="base model: a folder or a hub name")
    add("--tokenizer-path", help="folder that extend_tokenizer.py wrote")
    add("--plan", help="plan folder that plan_packing.py wrote")
    add(
        "--train-folder",
        help="without --plan: <tokenized-dir>/chatml_llamav13_32k/train, packed as in XTuner into rows of --max-length tokens",
    )
    add("--data-order", help="without --plan: data_order.txt (default: list the folder)")
    add("--num-workers", type=int, default=0, help="number of data loader processes")
    add("--log-interval", type=int, default=1, help="optimizer steps between progress lines")
    add("--heldout-dir", help="for --eval-steps: conversations as <dataset>/processed/<any>/<file>.jsonl")
    add_settings(parser.add_argument_group("settings, as in docs/config.md"), "render_train_config")
    return parser.parse_args()


def _check(arguments: argparse.Namespace) -> None:
    if arguments.plan and (arguments.train_folder or arguments.data_order):
        raise UserError("--plan already names the data", fix="remove --train-folder and --data-order")
    for name in ("model_path", "tokenizer_path", "plan" if not arguments.train_folder else "train_folder"):
        if not getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} is missing", fix="pass it, or --from-config")
    for name, least in (("log_interval", 1), ("num_workers", 0)):
        value = getattr(arguments, name)
        if value < least:
            raise UserError(f"invalid --{name.replace('_', '-')}", found=value, expected=f"{least} or more")
    for steps, what in (("eval_steps", "heldout_dir"), ("generate_steps", "prompts")):
        if getattr(arguments, steps) and not getattr(arguments, what):
            raise UserError(f"--{steps.replace('_', '-')} needs --{what.replace('_', '-')}", fix="pass both")


def main() -> None:
    """Writes the config, then loads it to check it."""
    arguments = parse_arguments()
    from snaketune.training.config_template import render_config
    from snaketune.training.train_config import load_config

    if arguments.from_config is not None:
        load_config(arguments.from_config)
        write_bytes(arguments.output, arguments.from_config.read_bytes())
        return
    _check(arguments)
    given = vars(arguments)
    settings = {flag.dest: given.pop(flag.dest) for flag in script_flags("render_train_config")}
    # A config holds plain literals, so paths become text and lists become tuples.
    settings["prompts"] = settings["prompts"] and str(settings["prompts"])
    settings["betas"], settings["loggers"] = tuple(settings["betas"]), tuple(settings["loggers"])
    output = given.pop("output")
    write_text(output, render_config(settings, **given))
    load_config(output)


if __name__ == "__main__":
    run(main)
