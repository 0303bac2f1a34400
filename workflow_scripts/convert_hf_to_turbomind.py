#!/usr/bin/env python3
"""Converts a Hugging Face folder to a TurboMind workspace, on a node with or without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Parses the command line (same as `lmdeploy convert`) and converts."""
    parser = argparse.ArgumentParser(
        description="Convert a Hugging Face model folder to a TurboMind workspace with lmdeploy 0.9.2.post1's converter. "
        "Takes the arguments of `lmdeploy convert`. Needs no GPU. Run it with the converter's Python "
        "(.venv-turbomind/bin/python), not the training environment's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model_name", help="name under which the model is served, such as internlm2-chat-7b")
    parser.add_argument("model_path", help="Hugging Face folder (or a hub name)")
    parser.add_argument(
        "--dst-path", type=Path, default=Path("workspace"), help="workspace to write; replaced if it exists"
    )
    add_settings(parser, "convert_hf_to_turbomind")
    parser.add_argument(
        "--model-format",
        choices=("hf", "awq", "gptq", "fp8"),
        default="hf",
        help="format of the input weights",
    )
    parser.add_argument(
        "--group-size", type=int, default=0, help="group size of 4-bit weights; 0: the format's default"
    )
    parser.add_argument(
        "--tokenizer-path", default=None, help="a different tokenizer file to copy into the workspace"
    )
    parser.add_argument("--revision", default=None, help="revision of a hub model")
    parser.add_argument("--download-dir", default=None, help="download folder for a hub model")
    args = parser.parse_args()

    from snaketune.export.turbomind_convert import convert, fetch_model

    manifest = convert(
        args.model_name,
        fetch_model(args.model_path, args.revision, args.download_dir),
        args.dst_path,
        chat_template=args.chat_template,
        tp=args.tp,
        dtype=args.dtype,
        session_len=args.session_len,
        model_format=args.model_format,
        group_size=args.group_size,
        tokenizer_path=args.tokenizer_path,
        trust_remote_code=args.trust_remote_code,
    )
    print(
        f"wrote {args.dst_path}: {manifest['architecture']}, {manifest['dtype']}, tp {manifest['tp']}, "
        f"rope base {manifest['rope_theta']:g}, contexts of up to {manifest['session_len']} tokens, "
        f"{len(manifest['files'])} files"
    )
    if manifest["sliding_window"]:
        print(
            f"the model has a sliding window of {manifest['sliding_window']} tokens. TurboMind has none, so it serves "
            "only contexts that fit into one window, where both compute the same"
        )


if __name__ == "__main__":
    run(main)
