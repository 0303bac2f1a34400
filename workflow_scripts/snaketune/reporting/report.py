"""Renders one self-contained page about a run: its results, data, settings and cost.

A section is a function here that returns the template's variables, a template of the same name, and an entry
in `SECTIONS`. For the files of a run and their contents see `snaketune.common.run_files` and `ReportInputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from snaketune.common import result_paths as names
from snaketune.common.files import read_json
from snaketune.reporting.bootstrap import Interval
from snaketune.reporting.cost import locked_packages, run_cost
from snaketune.reporting.mask_samples import mask_samples
from snaketune.reporting.page import page_template
from snaketune.reporting.plots import attempts, checkpoint_plot, length_histogram, loss_curve, speed_curve
from snaketune.reporting.report_inputs import ReportInputs
from snaketune.reporting.report_words import CHECKPOINT_FIGURES, Words


def render_report(inputs: ReportInputs) -> str:
    """Returns the page as HTML. The template engine escapes every text from outside.

    Raises:
        UserError: A file is missing, or base and tuned model were evaluated on different conversations.
    """
    sections = []
    for each in SECTIONS:
        values = each.values(inputs)
        if values is not None:
            html = Markup(page_template(f"{each.name}.html.j2").render(values))  # noqa: S704 - escaped there
            sections.append({"anchor": each.name.replace("_", "-"), "title": each.title, "html": html})
    return page_template("report.html.j2").render(
        title=inputs.run.name, sections=sections, **_summary(inputs)
    )


def _summary(inputs: ReportInputs) -> dict[str, Any]:
    """Returns the variables of the summary above the sections."""
    base, tuned = inputs.evaluations
    return {
        "config": inputs.run.config,
        "train": inputs.run.train,
        "base": base,
        "tuned": tuned,
        "all": inputs.heldout[0],
        "tool_calls": inputs.tool_calls,
        "samples": inputs.data["rows"][0]["samples"],
        "speed": inputs.speed,
    }


def tool_calls(inputs: ReportInputs) -> dict[str, Any] | None:
    return inputs.tool_calls and {"tool_calls": inputs.tool_calls}


def heldout(inputs: ReportInputs) -> dict[str, Any]:
    return {"evaluation": inputs.heldout, "generations": inputs.generations}


def opencompass(inputs: ReportInputs) -> dict[str, Any] | None:
    result = inputs.run.find(names.OPENCOMPASS)
    return result and {"opencompass": result}


def training(inputs: ReportInputs) -> dict[str, Any] | None:
    """Curves of the training metrics."""
    metrics = inputs.run.metrics
    if not metrics:
        return None
    timed = all("grad_norm" in record for record in metrics)
    return {
        "loss": Markup(loss_curve(metrics, inputs.run.evals)),  # noqa: S704 - our own SVG, holds no outside text
        "gradients": Markup(speed_curve(metrics)) if timed else None,  # noqa: S704
        "attempts": len(attempts(metrics)) + 1,
        "speed": inputs.speed,
    }


def checkpoints(inputs: ReportInputs) -> dict[str, Any] | None:
    """A table of the evaluated checkpoints, and plots of `best_metric` and the held-out loss."""
    curve = inputs.run.find(names.CHECKPOINT_CURVE)
    if curve is None:
        return None
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


def data(inputs: ReportInputs) -> dict[str, Any]:
    """The tokenised datasets, their packing, and samples with their masks."""
    return {
        "data": inputs.data,
        "histograms": [
            (name, Markup(length_histogram(**histogram)))  # noqa: S704 - our own SVG, holds no outside text
            for name, histogram in inputs.data["histograms"]
        ],
        "packing": read_json(inputs.plan) if inputs.plan else None,
        "mask_samples": mask_samples(inputs.datasets, inputs.tokenizer_path) if inputs.tokenizer_path else [],
    }


def gates(inputs: ReportInputs) -> dict[str, Any] | None:
    parity = inputs.run.find(names.PARITY)
    return parity and {"parity": parity}


def plan(inputs: ReportInputs) -> dict[str, Any] | None:
    """Rows of forecast and actual values. Memory is that of the largest process."""
    planned, train, metrics = inputs.run.find(names.RUN_PLAN), inputs.run.train, inputs.run.metrics
    if not planned or not metrics:
        return None
    chosen = next((row for row in planned["memory"] if row["chosen"]), None)
    peak = max(record.get("gpu_memory_mib", record.get("cpu_memory_mib", 0)) for record in metrics)
    rows = [
        (("optimizer steps", "优化器步"), planned["steps"], train["steps"]),
        (("tokens", "token"), planned["tokens"], train["tokens"]),
        (
            ("memory of a process (GiB)", "单个进程的内存（GiB）"),
            chosen and chosen["device_gib"],
            peak / 1024,
        ),
        (
            ("hours of training steps", "训练步时长（小时）"),
            planned["hours"],
            sum(record["seconds"] for record in metrics) / 3600,
        ),
    ]
    return {"rows": rows}


def cost(inputs: ReportInputs) -> dict[str, Any] | None:
    if inputs.benchmarks is None:
        return None
    rows = run_cost(inputs.run, inputs.benchmarks, inputs.benchmark_names)
    return {"cost": rows} if rows else None


def settings(inputs: ReportInputs) -> dict[str, Any]:
    return {"config": inputs.run.config}


def lineage(inputs: ReportInputs) -> dict[str, Any]:
    """Digests and versions of the run's inputs and outputs."""
    hf, turbomind = inputs.run.hf, inputs.run.turbomind
    return {
        "digests": _digests(inputs),
        "versions": _versions(inputs.run.train, hf, turbomind),
        "hf": hf,
        "turbomind": turbomind,
        "environment": locked_packages(inputs.lock) if inputs.lock else [],
    }


def _digests(inputs: ReportInputs) -> list[tuple[Words, str]]:
    train, hf, turbomind = inputs.run.train, inputs.run.hf, inputs.run.turbomind
    _, tuned = inputs.evaluations
    rows = [
        (("run identity", "run 标识"), train["identity"]),
        (("packed training data", "打包后的训练数据"), train.get("plan_sha256") or train["data_sha256"]),
        (("training config", "训练配置"), train["config_sha256"]),
        (("trained weights", "训练后的权重"), train["weights_sha256"]),
        (("held-out conversations", "留出对话"), tuned["heldout_sha256"]),
    ]
    digests = sorted({each.manifest["tokenizer_sha256"] for each in inputs.datasets})
    rows += [(("tokenizer", "分词器"), digest) for digest in digests]
    if hf:
        rows.append((("Hugging Face weights", "Hugging Face 权重"), hf["weights_sha256"]))
    if turbomind:
        # A folder for lmdeploy >= 0.10 has a Hugging Face config instead.
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


class Section(NamedTuple):
    """A section of the page, rendered by the template with its function's name.

    Attributes:
        values: Returns the template's variables; None leaves the section out.
        title: Text of its link at the top of the page; None for no link.
    """

    values: Callable[[ReportInputs], Mapping[str, Any] | None]
    title: Words | None

    @property
    def name(self) -> str:
        return self.values.__name__


SECTIONS = (
    Section(tool_calls, ("Tool calls", "工具调用")),
    Section(heldout, ("Held-out loss", "留出 loss")),
    Section(opencompass, ("OpenCompass", "OpenCompass")),
    Section(training, ("Training", "训练")),
    Section(checkpoints, ("Checkpoints", "各 checkpoint")),
    Section(data, ("Data", "数据")),
    Section(gates, ("Conversion gates", "转换校验")),
    Section(plan, None),
    Section(cost, ("Cost", "开销")),
    Section(settings, ("Settings", "设置")),
    Section(lineage, ("Lineage", "来源")),
)
