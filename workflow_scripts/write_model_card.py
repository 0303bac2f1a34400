#!/usr/bin/env python3
"""Writes a run's complete model card and the commands to serve its model."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common import result_paths as names
from snaketune.common.cli import run
from snaketune.common.files import read_json, write_json, write_text
from snaketune.common.run_files import RunFiles
from snaketune.serving.lmdeploy_engines import session_length
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Parses the command line, writes the files, and prints the commands."""
    parser = argparse.ArgumentParser(
        description="Write the model card of a run with its evaluation and parity gate, and write and print the commands "
        "that serve the model with lmdeploy, vLLM and SGLang.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="training config")
    parser.add_argument("train_manifest", type=Path, help="train.json of the run")
    parser.add_argument("hf", type=Path, help="Hugging Face folder")
    parser.add_argument(
        "--evaluations", type=Path, nargs="*", default=[], help="evaluate_model.py's JSON files"
    )
    parser.add_argument("--parity", type=Path, help="parity.json of the run")
    parser.add_argument("--turbomind", type=Path, help="converted folder, for lmdeploy 0.9.2.post1")
    parser.add_argument("--direct", type=Path, help="serving folder, for lmdeploy 0.10 and later")
    add_settings(parser, "write_model_card")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--commands", type=Path, required=True, help="text file to write")
    args = parser.parse_args()

    from snaketune.export.hf_convert import run_identity_fields
    from snaketune.export.model_card import model_card, tokenized_folder
    from snaketune.serving import commands
    from snaketune.training.train_config import load_config

    config = load_config(args.config)
    served = args.turbomind or args.direct
    given = {
        names.TRAIN: args.train_manifest,
        names.PARITY: args.parity,
        f"{names.HF}/{names.MANIFEST}": args.hf / names.MANIFEST,
        f"{names.TURBOMIND}/{names.MANIFEST}": served and served / names.MANIFEST,
    }
    files = RunFiles(args.train_manifest.parent, given=given)
    card = model_card(
        config.model_path,
        files.hf,
        files.train,
        run_identity_fields(files.checkpoint),
        tokenized_folder(config.plan, config.train_folder),
        str(args.hf),
        [read_json(path) for path in args.evaluations],
        files.find(names.PARITY),
    )
    write_text(args.output, card)
    text = serving_text(args, files, commands)
    write_text(args.commands, text)
    print(text, end="")


def serving_text(args: argparse.Namespace, files: RunFiles, commands) -> str:
    """Returns the commands, each under a comment that names its server, and the stop tokens."""
    hf, turbomind = files.hf, files.turbomind or {}
    template = (hf.get("chat_template") or {}).get("name", "internlm2_chat")
    served, tp = turbomind.get("model_name", "tuned"), turbomind.get("tp", 1)
    parts = {}
    if args.turbomind:
        chat_template = args.commands.with_name("lmdeploy_chat_template.json")
        write_json(chat_template, commands.chat_template_config(args.chat_template))
        length = turbomind.get("session_len")
        limit = f" (TurboMind has no sliding window, so contexts end at the model's: {length} tokens)"
        parts["lmdeploy 0.9.2.post1" + limit * bool(turbomind.get("sliding_window"))] = (
            commands.converted_command(args.turbomind, served, chat_template, tp, length)
        )
    if args.direct:
        parts["lmdeploy 0.10 and later"] = (args.direct / "serve.txt").read_text(encoding="utf-8").strip()
    else:
        length = session_length(read_json(args.hf / "config.json"), None)
        newer = commands.lmdeploy_command(args.hf, served, hf["architecture"], tp, length, template)
        parts["lmdeploy 0.10 and later"] = newer
    parts["vLLM"] = commands.vllm_command(args.hf, served, tp, template)
    parts["SGLang (no parser for these tool calls: they stay in the text of an answer)"] = (
        commands.sglang_command(args.hf, served, tp)
    )
    parts["chat in a terminal, also on a CPU"] = f"python workflow_scripts/chat.py {args.hf}"
    text = f"# An answer ends at {commands.stop_tokens(args.hf)}; each server takes this from generation_config.json.\n"
    return text + "".join(f"\n# {what}\n{command}\n" for what, command in parts.items())


if __name__ == "__main__":
    run(main)
