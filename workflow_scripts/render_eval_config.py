#!/usr/bin/env python3
"""Writes the OpenCompass config of one model, in the shape of the guide's step 7."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmark_suites.eval_config import BACKENDS, RUNNERS, EvalSettings
from benchmark_suites.groups import GROUPS
from common.cli import UserError, run
from common.files import read_json, write_text


def main() -> None:
    """Parses the command line and writes the config."""
    parser = argparse.ArgumentParser(
        description="Write a config for OpenCompass 0.5.4: groups of public datasets and sets of your own, the model with "
        "the chat template and the stop words that training used, and how the tasks are started.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="Python file to write")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model, for the backend")
    parser.add_argument("--tokenizer-path", required=True, help="folder of the extended tokenizer")
    parser.add_argument("--abbr", required=True, help="name of the model")
    parser.add_argument(
        "--train-manifest", type=Path, required=True, help="train.json: which checkpoint it is"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="hf", help="what runs the model")
    parser.add_argument(
        "--groups", nargs="*", choices=list(GROUPS), default=[], help="groups of public datasets"
    )
    parser.add_argument(
        "--custom", nargs="*", default=[], metavar="NAME=FILE", help="JSONL files of questions and answers"
    )
    parser.add_argument("--runner", choices=RUNNERS, default="local", help="how the tasks are started")
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--quotatype", help="srun's --quotatype, where a cluster has it")
    parser.add_argument(
        "--srun-options", help="more options of srun's, as one text: --srun-options='--mem=8G'"
    )
    for name, words in (
        ("max-num-workers", "tasks at a time that answer"),
        ("eval-max-num-workers", "tasks at a time that score"),
        ("datasets-per-task", "datasets that one task takes"),
        ("max-seq-len", "tokens of prompt and answer"),
        ("longtext-max-seq-len", "the same of the group longtext"),
        ("max-out-len", "longest answer in tokens, where the dataset does not say"),
        ("batch-size", "prompts at a time"),
        ("gpus", "GPUs of a task"),
    ):
        default = EvalSettings.__dataclass_fields__[name.replace("-", "_")].default
        parser.add_argument(f"--{name}", type=int, default=default, help=words)
    parser.add_argument("--max-samples", type=int, help="questions of each dataset; without it all")
    args = parser.parse_args()

    from benchmark_suites.eval_config import render_eval_config
    from ftdp.tokenizer import load_tokenizer

    given = vars(args)
    output, tokenizer, train = (given.pop(key) for key in ("output", "tokenizer_path", "train_manifest"))
    given["iteration"] = Path(read_json(train)["checkpoint"]).stem
    given["custom"] = dict(map(_custom_set, args.custom))
    write_text(output, render_eval_config(EvalSettings(**given), load_tokenizer(tokenizer)))
    for name in args.groups:
        if GROUPS[name].opt_in:
            print(f"note: {name} does not run as OpenCompass 0.5.4 ships it: {GROUPS[name].opt_in}")
    print(f"wrote {output}")


def _custom_set(text: str) -> tuple[str, Path]:
    name, found, path = text.partition("=")
    if not found:
        raise UserError("--custom is not as it should be", found=text, expected="NAME=FILE")
    return name, Path(path)


if __name__ == "__main__":
    run(main)
