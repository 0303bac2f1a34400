#!/usr/bin/env python3
"""Compares the evaluations of a run's checkpoints and links the best one."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common import result_paths as names
from snaketune.common.cli import run
from snaketune.common.files import write_json
from snaketune.common.run_files import RunFiles
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Writes the figures, links the best model, and removes pinned checkpoints and, if asked, other models."""
    parser = argparse.ArgumentParser(
        description="Compare the evaluations of a run's checkpoints, from the base model to the last step, and link the "
        "best model by a metric.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--train-manifest", type=Path, required=True, help="train.json of the run")
    parser.add_argument("--base", type=Path, nargs="+", required=True, help="evaluations of the base model")
    parser.add_argument("--tuned", type=Path, nargs="+", required=True, help="evaluations of the last step")
    parser.add_argument(
        "--tuned-model", type=Path, required=True, help="Hugging Face folder of the last step"
    )
    parser.add_argument(
        "--evaluations",
        type=Path,
        nargs="*",
        default=[],
        help="evaluations of the other checkpoints: JSON of evaluate_model.py and optionally evaluate_tool_calls.py",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--best", type=Path, required=True, help="link to create to the folder of the best model"
    )
    add_settings(parser, "choose_checkpoint")
    args = parser.parse_args()

    from snaketune.reporting.checkpoint_curve import checkpoint_curve, link_best, remove_others, remove_pinned

    given = {names.TRAIN: args.train_manifest, names.EVALUATIONS: args.output.parent}
    files = RunFiles(args.train_manifest.parent, given=given)
    curve = checkpoint_curve(files, args.base, args.tuned, args.evaluations, args.metric, args.tuned_model)
    link_best(curve, args.output.parent, args.best)
    write_json(args.output, curve)
    if args.keep == "best":
        remove_others(curve, args.output.parent)
    remove_pinned(files.run_folder)
    best = curve["best"]
    print(f"best by {args.metric}: step {best['step']}, {best['value']:.4f}; linked as {args.best}")


if __name__ == "__main__":
    run(main)
