"""One self-contained page about one run: what it learnt, from which data, with which settings, at what cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import UserError
from common.files import read_json

from .bootstrap import Interval, compared, loss_ratios
from .cost import attempt_costs, locked_packages, read_cost, trained_on_gpus
from .data_summary import Dataset, data_summary, load_dataset
from .mask_samples import mask_samples
from .page import page_template
from .plots import attempts, checkpoint_plot, length_histogram, loss_curve, speed_curve
from .report_words import CHECKPOINT_FIGURES, Words
from .tool_call_report import tool_call_summary


@dataclass(frozen=True)
class ReportFiles:
    """The files that a report is made of.

    Attributes:
        config: The run's merged settings.
        train_manifest: train.json.
        metrics: metrics.jsonl; None: in the run folder that train.json names.
        dataset_manifests: Manifests of the tokenised datasets.
        base_evaluation, tuned_evaluation: JSON of evaluate_model.py.
        hf_manifest, turbomind_manifest: manifest.json of the folders.
        base_tool_calls, tuned_tool_calls: JSON of evaluate_tool_calls.py.
        opencompass: JSON of evaluate_opencompass.py.
        checkpoints: JSON of choose_checkpoint.py.
        plan: plan.json of the pack plan.
        run_plan: run_plan.json.
        parity: parity.json.
        tokenizer_path: Folder of the extended tokenizer, which shows samples of the data.
        benchmarks: Folder of Snakemake's benchmark files, and `benchmark_names` which of them are this run's.
        lock: pip lock file of the environment.
    """

    config: Path
    train_manifest: Path
    dataset_manifests: list[Path]
    base_evaluation: Path
    tuned_evaluation: Path
    metrics: Path | None = None
    hf_manifest: Path | None = None
    turbomind_manifest: Path | None = None
    base_tool_calls: Path | None = None
    tuned_tool_calls: Path | None = None
    opencompass: Path | None = None
    checkpoints: Path | None = None
    plan: Path | None = None
    run_plan: Path | None = None
    parity: Path | None = None
    tokenizer_path: Path | None = None
    benchmarks: Path | None = None
    benchmark_names: tuple[str, ...] = ()
    lock: Path | None = None


def read_metrics(path: Path) -> list[dict]:
    """Reads `metrics.jsonl`; a last line that a killed writer left torn is skipped.

    Raises:
        UserError: When the file is missing or another line is broken.
    """
    if not path.is_file():
        raise UserError(f"no metrics at {path}", fix="give the file with --metrics")
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number} is not JSON", found=error) from None
    return records


def load_and_render(run: str, files: ReportFiles) -> str:
    """Reads the files and returns the page."""
    train = read_json(files.train_manifest)
    path = files.metrics or files.train_manifest.parent / train["run_folder"] / "metrics.jsonl"
    metrics, evals = read_metrics(path), path.with_name("evals.jsonl")
    datasets = [load_dataset(path) for path in files.dataset_manifests]
    on_gpus = trained_on_gpus(metrics)
    attempts = attempt_costs(path.parent, train["world_size"])

    def optional(path: Path | None) -> Any:
        return read_json(path) if path else None

    return render(
        run,
        read_json(files.config),
        train,
        metrics,
        datasets,
        read_json(files.base_evaluation),
        read_json(files.tuned_evaluation),
        optional(files.hf_manifest),
        optional(files.turbomind_manifest),
        read_metrics(evals) if evals.is_file() else (),
        base_tool_calls=optional(files.base_tool_calls),
        tuned_tool_calls=optional(files.tuned_tool_calls),
        opencompass=optional(files.opencompass),
        checkpoints=optional(files.checkpoints),
        plan=optional(files.plan),
        run_plan=optional(files.run_plan),
        parity=optional(files.parity),
        samples=mask_samples(datasets, files.tokenizer_path) if files.tokenizer_path else [],
        cost=read_cost(files.benchmarks, files.benchmark_names, attempts, on_gpus)
        if files.benchmarks
        else [],
        environment=locked_packages(files.lock) if files.lock else [],
    )


def render(
    run: str,
    config: Mapping[str, Any],
    train: Mapping[str, Any],
    metrics: list[dict],
    datasets: list[Dataset],
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    hf: Mapping[str, Any] | None = None,
    turbomind: Mapping[str, Any] | None = None,
    evals: Sequence[dict] = (),
    *,
    base_tool_calls: Mapping[str, Any] | None = None,
    tuned_tool_calls: Mapping[str, Any] | None = None,
    opencompass: Mapping[str, Any] | None = None,
    checkpoints: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    run_plan: Mapping[str, Any] | None = None,
    parity: Mapping[str, Any] | None = None,
    samples: list[dict[str, Any]] | None = None,
    cost: list[dict[str, Any]] | None = None,
    environment: list[dict[str, Any]] | None = None,
) -> str:
    """Returns the page as HTML. Every text that comes from outside is escaped by the template engine.

    Args:
        run: Name of the run.
        config: The run's merged settings, section by section.
        train: `train.json`.
        metrics: Records of `metrics.jsonl`.
        datasets: The tokenised datasets.
        base: Evaluation of the base model, as evaluate_model.py writes it.
        tuned: The same of the tuned model.
        hf: Manifest of the Hugging Face folder.
        turbomind: Manifest of the TurboMind workspace.
        evals: Records of `evals.jsonl`.
        base_tool_calls: What evaluate_tool_calls.py wrote about the base model.
        tuned_tool_calls: The same of the tuned model; both or neither.
        opencompass: What evaluate_opencompass.py wrote.
        checkpoints: What choose_checkpoint.py wrote.
        plan: `plan.json` of the pack plan.
        run_plan: `run_plan.json`.
        parity: `parity.json`.
        samples: From `mask_samples`.
        cost: From `read_cost`.
        environment: From `locked_packages`.

    Raises:
        UserError: When the two evaluations are not about the same conversations.
    """
    from markupsafe import Markup

    if base["heldout_sha256"] != tuned["heldout_sha256"]:
        raise UserError(
            "base and tuned model were evaluated on different held-out conversations",
            found=f"{base['heldout_sha256'][:12]} and {tuned['heldout_sha256'][:12]}",
            fix="run evaluate_model.py for both with the same --heldout-dir",
        )
    data = data_summary(datasets)
    both = base_tool_calls is not None and tuned_tool_calls is not None
    return page_template("report.html.j2").render(
        title=run,
        config=config,
        train=train,
        base=base,
        tuned=tuned,
        evaluation=_evaluation_rows(base, tuned),
        generations=_side_by_side(base, tuned),
        opencompass=opencompass,
        checkpoints=_checkpoints(checkpoints) if checkpoints else None,
        tool_calls=tool_call_summary(base_tool_calls, tuned_tool_calls) if both else None,
        data=data,
        histograms=[
            (name, Markup(length_histogram(**histogram)))  # noqa: S704 - our own SVG, holds no outside text
            for name, histogram in data["histograms"]
        ],
        packing=plan,
        mask_samples=samples,
        curves=_curves(metrics, evals),
        speed=_speed(metrics),
        parity=parity,
        cost=cost,
        forecast=_forecast(run_plan, train, metrics) if run_plan and metrics else None,
        lineage=_lineage(train, datasets, base, tuned, hf, turbomind),
        versions=_versions(train, hf, turbomind),
        hf=hf,
        turbomind=turbomind,
        environment=environment,
    )


def _curves(metrics: list[dict], evals: Sequence[dict]) -> dict[str, Any] | None:
    from markupsafe import Markup

    if not metrics:
        return None
    timed = all("grad_norm" in record for record in metrics)
    return {
        "loss": Markup(loss_curve(metrics, evals)),  # noqa: S704 - our own SVG, holds no outside text
        "speed": Markup(speed_curve(metrics)) if timed else None,  # noqa: S704
        "attempts": len(attempts(metrics)) + 1,
    }


def _checkpoints(curve: Mapping[str, Any]) -> dict[str, Any]:
    """A table of the evaluated checkpoints and a plot of what the best is best by, with the held-out loss beside it."""
    from markupsafe import Markup

    points, best = curve["points"], curve["best"]["step"]
    shown = [name for name in CHECKPOINT_FIGURES if name in points[-1]["figures"]]
    plotted = dict.fromkeys((curve["metric"], "loss"))
    return {
        "metric": curve["metric"],
        "names": shown,
        "rows": [
            {
                "step": point["step"],
                "best": point["step"] == best,
                "figures": {name: Interval(**point["figures"][name]) for name in shown},
            }
            for point in points
        ],
        "plots": [
            Markup(  # noqa: S704 - our own SVG, holds no outside text
                checkpoint_plot(
                    [point["step"] for point in points],
                    [point["figures"][name] for point in points],
                    best,
                    CHECKPOINT_FIGURES[name],
                )
            )
            for name in plotted
        ],
    }


def _evaluation_rows(base: Mapping, tuned: Mapping) -> list[dict[str, Any]]:
    """One row for all conversations and one for each dataset; `change` is tuned minus base.

    `intervals` are those of base, tuned and change, by drawing conversations; without bounds where an evaluation does
    not tell conversations apart, as an earlier release's, or the two cut them differently.
    """
    rows = []
    for name in [None, *sorted(base["datasets"])]:
        before, after = (each if name is None else each["datasets"][name] for each in (base, tuned))
        measured = before["loss"] is not None and after["loss"] is not None
        change = after["loss"] - before["loss"] if measured else None
        figures = (before["loss"], after["loss"], change)
        rows.append(
            {
                "name": name,
                "base": before,
                "tuned": after,
                "change": change,
                "intervals": dict(
                    zip(("base", "tuned", "change"), _intervals(base, tuned, name, figures), strict=True)
                ),
            }
        )
    return rows


def _intervals(
    base: Mapping, tuned: Mapping, dataset: str | None, figures: tuple[float | None, ...]
) -> Sequence[Interval]:
    before, after = (loss_ratios(each.get("conversations", {}), dataset) for each in (base, tuned))
    if not len(before.below) or not np.array_equal(before.below, after.below):
        return [Interval(figure, None, None) for figure in figures]
    return compared(before, after)["loss"]


def _side_by_side(base: Mapping, tuned: Mapping) -> list[dict[str, Any]]:
    answers = {json.dumps(answer["prompt"], sort_keys=True): answer for answer in base["generations"]}
    return [
        {
            "prompt": answer["prompt"],
            "base": answers.get(json.dumps(answer["prompt"], sort_keys=True)),
            "tuned": answer,
        }
        for answer in tuned["generations"]
    ]


def _speed(metrics: list[dict]) -> dict[str, float] | None:
    """Tokens per second over all steps but the first, which also warms up, and seconds in all."""
    timed = [record for record in metrics if "seconds" in record]
    if len(timed) < 2:
        return None
    seconds = sum(record["seconds"] for record in timed[1:])
    tokens = sum(record["tokens"] for record in timed[1:])
    return {"tokens_per_second": tokens / max(seconds, 1e-9), "seconds": seconds + timed[0]["seconds"]}


def _forecast(plan: Mapping, train: Mapping, metrics: list[dict]) -> list[dict[str, Any]]:
    """Rows of what was planned beside what happened; memory is that of the process with most."""
    chosen = next((row for row in plan["memory"] if row["chosen"]), None)
    peak = max(record.get("gpu_memory_mib", record.get("cpu_memory_mib", 0)) for record in metrics)
    hours = sum(record["seconds"] for record in metrics) / 3600
    return [
        {"name": ("optimizer steps", "优化器步"), "planned": plan["steps"], "actual": train["steps"]},
        {"name": ("tokens", "token"), "planned": plan["tokens"], "actual": train["tokens"]},
        {
            "name": ("memory of a process (GiB)", "单个进程的内存（GiB）"),
            "planned": chosen and chosen["device_gib"],
            "actual": peak / 1024,
        },
        {
            "name": ("hours of training steps", "训练步时长（小时）"),
            "planned": plan["hours"],
            "actual": hours,
        },
    ]


def _lineage(train, datasets, base, tuned, hf, turbomind) -> list[tuple[Words, str]]:
    rows = [
        (("run identity", "run 标识"), train["identity"]),
        (("packed training data", "打包后的训练数据"), train.get("plan_sha256") or train["data_sha256"]),
        (("training config", "训练 config"), train["config_sha256"]),
        (("trained weights", "训练后的权重"), train["weights_sha256"]),
        (("held-out conversations", "留出对话"), tuned["heldout_sha256"]),
    ]
    digests = sorted({each.manifest["tokenizer_sha256"] for each in datasets})
    rows += [(("tokenizer", "分词器"), digest) for digest in digests]
    if hf:
        rows.append((("Hugging Face weights", "Hugging Face 权重"), hf["weights_sha256"]))
    if turbomind:
        # A folder for lmdeploy >= 0.10 has Hugging Face's config.
        name = next(
            name
            for name in ("triton_models/weights/config.yaml", "config.json")
            if name in turbomind["files"]
        )
        rows.append(((f"TurboMind {Path(name).name}",) * 2, turbomind["files"][name]["sha256"]))
    rows.append((("git commit",) * 2, train.get("git_commit") or "unknown"))
    return rows


def _versions(train, hf, turbomind) -> list[tuple[Words, dict[str, Any]]]:
    stages = [
        (("versions, training", "版本：训练"), train),
        (("versions, Hugging Face conversion", "版本：转换为 Hugging Face"), hf),
        (("versions, TurboMind conversion", "版本：转换为 TurboMind"), turbomind),
    ]
    return [(name, manifest["versions"]) for name, manifest in stages if manifest and "versions" in manifest]
