#!/usr/bin/env python3
"""The gate after the conversions: compares logits and ids of the checkpoint, Hugging Face and TurboMind."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import UserError, run
from snaketune.common.files import read_json, write_json
from snaketune.common.slurm import job_record
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Parses the command line, compares, and writes one JSON file. Any unexplained difference is an error."""
    parser = argparse.ArgumentParser(
        description="Compare a trained model with its conversions, on fixed prompts with tool calls: the logits of the "
        "training checkpoint, the Hugging Face folder and the TurboMind files, and the ids that training, "
        "transformers and lmdeploy encode the prompts to. Also checks every weight of the TurboMind folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="training config")
    parser.add_argument("checkpoint", type=Path, help="iter_N.pth, a run folder, or train.json")
    parser.add_argument("hf", type=Path, help="Hugging Face folder")
    parser.add_argument("--turbomind", type=Path, help="TurboMind workspace (default: not compared)")
    parser.add_argument(
        "--readings", type=Path, help="JSON file of encode_prompts.py from the converter's environment"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    add_settings(parser, "check_parity")
    args = parser.parse_args()

    from snaketune.chat_format.jinja_template import reads_openai_tools
    from snaketune.encoding.tokenizer import load_tokenizer
    from snaketune.export.checkpoint_source import find_checkpoint
    from snaketune.parity.id_parity import compare_ids, require_agreement, training_ids
    from snaketune.parity.logit_parity import compare_models, trained_weights
    from snaketune.parity.prompt_readers import parity_prompts, read_with_transformers
    from snaketune.parity.turbomind_proof import prove
    from snaketune.training.train_config import load_config

    config = load_config(args.config)
    encoding = ChatEncoding.from_options(vars(args))
    tokenizer = load_tokenizer(config.tokenizer_path or config.model_path).with_template(encoding.template)
    prompts = parity_prompts(args.prompts)
    expected = training_ids(prompts, tokenizer, encoding)
    readings = [read_with_transformers(args.hf, prompts)]
    if reads_openai_tools(tokenizer.template):
        readings.append(read_with_transformers(args.hf, prompts, openai=True))
    theirs = (
        read_json(args.readings) if args.readings else {"prompts": prompts, "readings": [], "logits": None}
    )
    if theirs["prompts"] != prompts:
        raise UserError(f"{args.readings} has different prompts", fix="run encode_prompts.py again")
    ids = compare_ids(prompts, expected, readings + theirs["readings"], tokenizer)
    print_ids(ids)
    require_agreement(ids)
    state = trained_weights(config, *find_checkpoint(args.checkpoint), args.trust_remote_code)
    compared = compare_models(
        config, state, args.hf, args.turbomind, expected, theirs["logits"], args.trust_remote_code
    )
    print_logits(compared)
    proof = prove(args.hf, args.turbomind, forward=False) if args.turbomind else None
    write_json(args.output, {"format": 1, **compared, "ids": ids, "turbomind": proof, **job_record()})
    print("parity holds" + (f"; {proof['tensors']} tensors equal bit for bit" if proof else ""))


def print_ids(rows: list[dict]) -> None:
    """Prints which readers agree with training, and each difference with its reason."""
    for row in rows:
        print(f"{row['equal']}/{row['prompts']} prompts have training's ids in {row['reader']}")
        for each in row["differences"]:
            print(
                f"    prompt {each['prompt']}, token {each['at']}: {each['reader']!r} instead of {each['training']!r}"
            )
            print(f"    why: {each['why'] or 'unknown, so the gate fails'}")


def print_logits(compared: dict) -> None:
    """Prints the differences between logits, and what was not compared."""
    for row in compared["logits"]:
        print(
            f"{row['of']} against {row['against']} in {row['dtype']}: relative {row['relative_difference']:.1e}, "
            f"largest {row['largest_difference']:.1e}, top-1 agreement {row['top1_agreement']:.1%}, "
            f"rounding itself {row['rounding_difference']:.1e}, up to {row['tokens']} tokens"
        )
    for name, limit in compared["limits"].items():
        print(f"the model computes differently beyond {limit} tokens ({name})")
    for each in compared["unread"]:
        print(f"logits of {each['reader']}: {each['why']}")


if __name__ == "__main__":
    run(main)
