"""Proves that a base model's architecture trains correctly with these settings, or says which settings would.

Needs the base's config.json, not its weights, and takes seconds on one CPU core: it checks a small model of the same
architecture with random weights. Each document of a packed sequence must get the logits, loss and gradients that it gets
alone in plain attention. For ZeRO-3, two ranks must train it as a plain loop does.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from snaketune.common.cli import run
from snaketune.common.files import write_json
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Parses the command line, runs the checks, and prints and writes what they found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder with the base's config.json, or a hub name")
    parser.add_argument("--output", type=Path, help="write the findings to this JSON file")
    parser.add_argument(
        "--turbomind-runs",
        type=json.loads,
        default={},
        help="settings of runs of this model, by name, as JSON; refuses what lmdeploy cannot serve",
    )
    add_settings(parser, "prove_architecture")
    args = parser.parse_args()

    if args.zero_stage == 3:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # its ranks train on the CPU
    from transformers.utils import logging

    from snaketune.export.turbomind_limits import check_run
    from snaketune.models.base_model import read_model_config
    from snaketune.preflight.architecture_proof import TrainingOptions, prove

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    given = {key.removeprefix("lora_"): value for key, value in vars(args).items() if key.startswith("lora_")}
    lora = {key: value for key, value in given.items() if value is not None}
    lora.setdefault("alpha", 2 * lora.get("rank", 0))
    options = TrainingOptions(
        attention=args.attention,
        packing=args.packing_mode,
        max_length=args.max_length,
        gradient_checkpointing=args.gradient_checkpointing,
        lora=lora if "rank" in lora else None,
        trust_remote_code=args.trust_remote_code,
    )
    config = read_model_config(args.model, args.trust_remote_code)
    for name, run_settings in args.turbomind_runs.items():
        check_run(name, run_settings)  # a hub model's config is on this machine only now
    proof = prove(config, options)
    if args.zero_stage == 3:
        from sft import import_for_training
        from snaketune.preflight.zero3_proof import prove_zero_3

        import_for_training()  # before the ranks are forked
        proof["checks"].append(prove_zero_3(config, options))
    if args.output:
        write_json(args.output, proof)
    twin = proof["twin"]
    print(
        f"{proof['model_type']}, attention {proof['attention']}: a model with {twin['layers']} layers and "
        f"{twin['weights']:,} random weights"
    )
    for check in proof["checks"]:
        print(f"  {check['difference']:8.1e}  (at most {check['bound']:g})  {check['name']}")
    if proof["lora"]:
        print(f"in that model, {proof['lora']}")
    print(f"{proof['seconds']} s, {proof['peak_bytes'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    run(main)
