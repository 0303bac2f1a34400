#!/usr/bin/env python3
"""Proves that a TurboMind workspace has the weights, settings and logits of its Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run
from snaketune.common.files import write_json


def main() -> None:
    """Parses the command line, compares, and writes one JSON file."""
    parser = argparse.ArgumentParser(
        description="Read a TurboMind workspace without lmdeploy and compare it with the Hugging Face folder that it was "
        "made from: every weight bit for bit, the settings, and the logits of a forward pass. Report any difference as an "
        "error.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("hf", type=Path, help="Hugging Face folder")
    parser.add_argument("turbomind", type=Path, help="TurboMind workspace")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()

    from snaketune.parity.turbomind_proof import prove

    proof = prove(args.hf, args.turbomind)
    if args.output:
        write_json(args.output, proof)
    forward = proof["forward"]
    print(
        f"{proof['tensors']} tensors equal bit for bit, {len(proof['config'])} settings equal, logits of "
        f"{forward['tokens']} tokens within {forward['relative_difference']:.1e}"
    )


if __name__ == "__main__":
    run(main)
