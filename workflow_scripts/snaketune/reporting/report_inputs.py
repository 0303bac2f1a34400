"""Inputs of the report's sections: the run's files, shared files, and figures computed from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from snaketune.common import result_paths as names
from snaketune.common.cli import UserError
from snaketune.common.run_files import RunFiles
from snaketune.reporting.bootstrap import Interval, compared, loss_ratios
from snaketune.reporting.data_summary import Dataset, data_summary, load_dataset
from snaketune.reporting.tool_call_report import tool_call_summary


@dataclass(frozen=True)
class ReportInputs:
    """A report's run and the files it shares with other runs. Reads and computes on first use.

    Attributes:
        run: The run's own files.
        dataset_manifests: Manifests of the tokenised datasets.
        plan: plan.json of the pack plan.
        tokenizer_path: Folder of the extended tokenizer, used to show samples of the data.
        benchmarks: Folder of Snakemake's benchmark files.
        benchmark_names: Names of this run's benchmark files.
        lock: pip lock file of the environment.
    """

    run: RunFiles
    dataset_manifests: Sequence[Path]
    plan: Path | None = None
    tokenizer_path: Path | None = None
    benchmarks: Path | None = None
    benchmark_names: Sequence[str] = ()
    lock: Path | None = None

    @cached_property
    def datasets(self) -> list[Dataset]:
        return [load_dataset(path) for path in self.dataset_manifests]

    @cached_property
    def data(self) -> dict[str, Any]:
        """See `data_summary`."""
        return data_summary(self.datasets)

    @cached_property
    def evaluations(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The results of evaluate_model.py for the base and the tuned model.

        Raises:
            UserError: They used different conversations.
        """
        base, tuned = (self.run.read(names.EVALUATION, label=label) for label in ("base", "tuned"))
        if base["heldout_sha256"] != tuned["heldout_sha256"]:
            raise UserError(
                "the base and tuned models were evaluated on different held-out conversations",
                found=f"{base['heldout_sha256'][:12]} and {tuned['heldout_sha256'][:12]}",
                fix="run evaluate_model.py for both with the same --heldout-dir",
            )
        return base, tuned

    @cached_property
    def heldout(self) -> list[dict[str, Any]]:
        """One row for all conversations and one per dataset; `change` is tuned minus base.

        `intervals` has the bootstrap intervals of base, tuned and change. They have no bounds if an
        evaluation does not list its conversations, as in earlier releases, or if the two cut them
        differently.
        """
        base, tuned = self.evaluations
        rows = []
        for name in [None, *sorted(base["datasets"])]:
            before, after = (each if name is None else each["datasets"][name] for each in (base, tuned))
            measured = before["loss"] is not None and after["loss"] is not None
            change = after["loss"] - before["loss"] if measured else None
            figures = (before["loss"], after["loss"], change)
            intervals = _intervals(base, tuned, name, figures)
            rows.append(
                {
                    "name": name,
                    "base": before,
                    "tuned": after,
                    "change": change,
                    "intervals": dict(zip(("base", "tuned", "change"), intervals, strict=True)),
                }
            )
        return rows

    @cached_property
    def generations(self) -> list[dict[str, Any]]:
        """Answers of both models to the same prompts: `prompt`, `base` (None: not generated) and `tuned`."""
        base, tuned = self.evaluations
        answers = {json.dumps(answer["prompt"], sort_keys=True): answer for answer in base["generations"]}
        return [
            {
                "prompt": answer["prompt"],
                "base": answers.get(json.dumps(answer["prompt"], sort_keys=True)),
                "tuned": answer,
            }
            for answer in tuned["generations"]
        ]

    @cached_property
    def tool_calls(self) -> dict[str, Any] | None:
        """See `tool_call_summary`; None unless both models have a tool call evaluation."""
        base, tuned = (self.run.find(names.TOOL_CALLS, label=label) for label in ("base", "tuned"))
        return tool_call_summary(base, tuned) if base is not None and tuned is not None else None

    @cached_property
    def speed(self) -> dict[str, float] | None:
        """Tokens per second without the first step, which includes warm-up, and total seconds."""
        timed = [record for record in self.run.metrics if "seconds" in record]
        if len(timed) < 2:
            return None
        seconds = sum(record["seconds"] for record in timed[1:])
        tokens = sum(record["tokens"] for record in timed[1:])
        return {"tokens_per_second": tokens / max(seconds, 1e-9), "seconds": seconds + timed[0]["seconds"]}


def _intervals(
    base: Mapping, tuned: Mapping, dataset: str | None, figures: tuple[float | None, ...]
) -> Sequence[Interval]:
    before, after = (loss_ratios(each.get("conversations", {}), dataset) for each in (base, tuned))
    if not len(before.below) or not np.array_equal(before.below, after.below):
        return [Interval(figure, None, None) for figure in figures]
    return compared(before, after)["loss"]
