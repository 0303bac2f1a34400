#!/usr/bin/env python3
"""Makes a serving folder for lmdeploy 0.10 and later from a Hugging Face folder, without conversion."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Parses the command line and makes the folder."""
    parser = argparse.ArgumentParser(
        description="Make a serving folder for lmdeploy >= 0.10, which loads Hugging Face folders: the same weight files "
        "(hard links), a config that lmdeploy's TurboMind engine accepts if possible, and the command in serve.txt.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("dst", type=Path, help="folder to write; replaced if it exists")
    add_settings(parser, "link_serving_folder")
    args = parser.parse_args()

    from snaketune.export.lmdeploy_folder import make_serving_folder

    manifest = make_serving_folder(
        args.model, args.dst, model_name=args.model_name, tp=args.tp, session_len=args.session_len
    )
    print(
        f"wrote {args.dst}: {manifest['architecture']} (trained as {manifest['trained_architecture']}), "
        f"{manifest['dtype']}, {len(manifest['files'])} files"
        + (f", contexts of up to {manifest['session_len']} tokens" if manifest["session_len"] else "")
    )


if __name__ == "__main__":
    run(main)
