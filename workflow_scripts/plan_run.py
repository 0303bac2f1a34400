#!/usr/bin/env python3
"""Forecasts a run before it starts: steps, tokens, memory for each ZeRO stage, hours and disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run
from snaketune.common.files import read_json, write_json
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Parses the command line, then prints and writes the forecast."""
    parser = argparse.ArgumentParser(
        description="Forecast a run from its settings, its pack plan and the model's config: steps, tokens, memory per GPU "
        "for each ZeRO stage and offload, hours and GPU-hours, and disk space for checkpoints. Reports which settings fit.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="config.json of the run")
    parser.add_argument("--plan", type=Path, required=True, help="folder of the pack plan")
    parser.add_argument(
        "--tokenizer-path", type=Path, help="folder of the extended tokenizer, which adds vocabulary rows"
    )
    add_settings(parser, "plan_run")
    parser.add_argument("--metrics", type=Path, help="use the speed in this metrics.jsonl of an earlier run")
    parser.add_argument("--output", type=Path, help="write the forecast to this JSON file")
    args = parser.parse_args()

    from snaketune.export.hf_tensors import empty_model
    from snaketune.export.turbomind_limits import check_run
    from snaketune.models.positions import read_positions
    from snaketune.preflight.memory_forecast import read_shape
    from snaketune.preflight.run_forecast import make_run_plan, measured_speed

    config = read_json(args.config)
    model, lora = config["model"], config["train"]["lora"]
    vocab_size = (
        read_json(args.tokenizer_path / "manifest.json")["vocab_size"] if args.tokenizer_path else None
    )
    base = empty_model(model["path"] or model["hub"], model["trust_remote_code"])
    positions = read_positions(base)  # before it gets adapters
    plan = make_run_plan(
        config,
        args.plan,
        read_shape(base, vocab_size, lora and lora["rank"]),
        positions,
        gpus=args.gpus,
        device_gib=args.memory_gib,
        tokens_per_second=args.tokens_per_second or (measured_speed(args.metrics) if args.metrics else None),
    )
    check_run(args.config.parent.name, config)  # a hub model's config is on this machine only now
    if args.output:
        write_json(args.output, plan)
    where = f"{plan['gpus']} GPUs" if plan["gpus"] else f"{plan['ranks']} CPU process(es)"
    print(f"{plan['parameters']:,} parameters in {plan['dtype']} on {where}")
    print(
        f"{plan['rows']:,} rows per epoch, {plan['steps']:,} steps, {plan['epochs']} epochs, {plan['tokens']:,} tokens"
    )
    documents = plan["documents"]
    if documents["beyond_positions"]:
        print(
            f"warning: {documents['beyond_positions']:,} documents are longer than the {documents['positions']:,} positions that"
            f" the base was made for (the longest has {documents['longest']:,} tokens)"
        )
    if documents["beyond_window"]:
        print(
            f"{documents['beyond_window']:,} documents are longer than the {documents['window']:,} tokens that layers with a"
            " window see"
        )
    if plan["hours"] is not None:
        print(
            f"{plan['hours']:,.2f} hours, {plan['gpu_hours']:,.2f} GPU-hours at {plan['tokens_per_second']:,.0f} tokens/s"
        )
    print(
        f"checkpoints: {plan['checkpoint_gb']:,.2f} GB each, up to {plan['checkpoints_gb']:,.2f} GB at a time"
    )
    if plan["activations_unknown"]:
        print(f"memory is at least this, since the activations are not known: {plan['activations_unknown']}")
    print(f"{'ZeRO':>4}  {'offload':9}  {'GiB each':>9}  {'GiB host':>9}")
    for row in plan["memory"]:
        mark = {True: "fits", None: "may fit"}.get(row["fits"], f"does not fit into {plan['device_gib']:g}")
        chosen = "  <- the config's" if row["chosen"] else ""
        print(
            f"{row['zero_stage']:4}  {row['offload']:9}  {row['device_gib']:9,.2f}  {row['host_gib']:9,.2f}  {mark}{chosen}"
        )


if __name__ == "__main__":
    run(main)
