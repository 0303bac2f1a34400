#!/usr/bin/env python3
"""Lists the checkpoints of a training that will be evaluated, as soon as the training has started."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import UserError, run
from snaketune.common.files import read_json, write_json


def main() -> None:
    """Parses the command line and writes the list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("started", type=Path, help="JSON file written by train_model.py --started")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, in the same folder")
    args = parser.parse_args()
    if not args.started.is_file():
        raise UserError(
            f"{args.started} is missing: the training has not started",
            fix="check the log of train_model, and run again",
        )
    started = read_json(args.started)
    write_json(args.output, started)
    print(f"checkpoints to evaluate: steps {', '.join(map(str, started['steps'])) or '(none)'}")


if __name__ == "__main__":
    run(main)
