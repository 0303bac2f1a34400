"""Writes a run's complete settings beside its results."""

from __future__ import annotations

import argparse
import json

from snaketune.common.cli import UserError, run
from snaketune.common.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--settings", required=True, help="the settings, as one JSON object")
    args = parser.parse_args()
    try:
        settings = json.loads(args.settings)
    except ValueError as error:
        raise UserError("--settings is not JSON", found=error, expected="one JSON object") from None
    write_json(args.output, settings)


if __name__ == "__main__":
    run(main)
