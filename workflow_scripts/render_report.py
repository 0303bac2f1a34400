#!/usr/bin/env python3
"""Writes the report of one run: a self-contained HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common import result_paths as names
from snaketune.common.cli import run
from snaketune.common.files import write_text
from snaketune.common.run_files import RunFiles


def main() -> None:
    """Parses the command line and writes the page."""
    parser = argparse.ArgumentParser(
        description="Write the report of one run as a self-contained HTML page, in English and Chinese: tool calls and "
        "held-out loss of base and tuned model, answers side by side, curves, data, masks, gates, cost, settings and digests."
    )
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--config", type=Path, required=True, help="the run's merged settings, JSON")
    parser.add_argument("--train-manifest", type=Path, required=True, help="train.json of the run")
    parser.add_argument(
        "--metrics", type=Path, help="metrics.jsonl (default: in the run folder that train.json names)"
    )
    parser.add_argument(
        "--dataset-manifests",
        type=Path,
        nargs="+",
        required=True,
        help="manifests of the tokenised datasets, or tokenized.json, which lists them all",
    )
    parser.add_argument(
        "--base-evaluation", type=Path, required=True, help="evaluate_model.py's JSON of the base model"
    )
    parser.add_argument("--tuned-evaluation", type=Path, required=True, help="the same of the tuned model")
    parser.add_argument("--hf-manifest", type=Path, help="manifest.json of the Hugging Face folder")
    parser.add_argument("--turbomind-manifest", type=Path, help="manifest.json of the TurboMind workspace")
    parser.add_argument(
        "--base-tool-calls", type=Path, help="evaluate_tool_calls.py's JSON of the base model"
    )
    parser.add_argument("--tuned-tool-calls", type=Path, help="the same of the tuned model")
    parser.add_argument("--opencompass", type=Path, help="evaluate_opencompass.py's JSON")
    parser.add_argument(
        "--checkpoints", type=Path, help="choose_checkpoint.py's JSON, for the metrics by step"
    )
    parser.add_argument("--plan", type=Path, help="plan.json of the pack plan")
    parser.add_argument("--run-plan", type=Path, help="run_plan.json: the forecast of the run")
    parser.add_argument("--parity", type=Path, help="parity.json: the results of the parity gate")
    parser.add_argument(
        "--tokenizer-path", type=Path, help="folder of the extended tokenizer; shows samples of the data"
    )
    parser.add_argument(
        "--benchmarks", type=Path, help="folder of Snakemake's benchmark files; shows the cost"
    )
    parser.add_argument(
        "--benchmark-names",
        nargs="+",
        default=(),
        help="names of the run, its data and its tokenizer in the benchmark folder",
    )
    parser.add_argument("--lock", type=Path, help="pip lock file of the environment")
    args = parser.parse_args()

    from snaketune.reporting.report import render_report
    from snaketune.reporting.report_inputs import ReportInputs
    from snaketune.tokenized.manifests import manifest_paths

    given = {
        names.CONFIG: args.config,
        names.TRAIN: args.train_manifest,
        names.METRICS: args.metrics,
        f"{names.HF}/{names.MANIFEST}": args.hf_manifest,
        f"{names.TURBOMIND}/{names.MANIFEST}": args.turbomind_manifest,
        names.EVALUATION.format(label="base"): args.base_evaluation,
        names.EVALUATION.format(label="tuned"): args.tuned_evaluation,
        names.TOOL_CALLS.format(label="base"): args.base_tool_calls,
        names.TOOL_CALLS.format(label="tuned"): args.tuned_tool_calls,
        names.OPENCOMPASS: args.opencompass,
        names.CHECKPOINT_CURVE: args.checkpoints,
        names.RUN_PLAN: args.run_plan,
        names.PARITY: args.parity,
    }
    page = render_report(
        ReportInputs(
            RunFiles(args.train_manifest.parent, args.run, given),
            [path for each in args.dataset_manifests for path in manifest_paths(each)],
            args.plan,
            args.tokenizer_path,
            args.benchmarks,
            args.benchmark_names,
            args.lock,
        )
    )
    write_text(args.output, page)
    print(f"wrote {args.output} ({len(page) // 1024} KiB)")


if __name__ == "__main__":
    run(main)
