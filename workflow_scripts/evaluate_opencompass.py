#!/usr/bin/env python3
"""Runs OpenCompass on a model and writes its scores as one JSON file. Runs in OpenCompass's environment."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run
from snaketune.common.files import write_json
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Parses the command line, runs OpenCompass and writes the scores."""
    parser = argparse.ArgumentParser(
        description="Run OpenCompass 0.5.4 with a config from render_eval_config.py, on this machine or through Slurm as "
        "set in the config, and write all scores to one JSON file. Unlike OpenCompass itself, this command fails if a "
        "task fails, and names the task's log. The next run resumes with the missing tasks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="config written by render_eval_config.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="folder for predictions, logs and summaries"
    )
    add_settings(parser, "evaluate_opencompass")
    args = parser.parse_args()

    from snaketune.opencompass.eval_run import evaluate

    result = evaluate(args.config, args.work_dir, args.data_dir)
    write_json(args.output, result)
    for row in result["scores"]:
        print(f"{row['group'] or 'average'}: {row['dataset']} {row['metric']} {row['score']:.2f}")


if __name__ == "__main__":
    run(main)
