"""Several runs side by side: figures of each with intervals, and the paired difference to the first of them.

A difference is on the same draws of the same held-out conversations for both runs. Where two runs were not evaluated on
the same conversations, or not in the same way, there is none, and `refused` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import read_json, sha256_file

from .bootstrap import Interval, compared, intervals, loss_ratios
from .cost import attempt_costs, read_cost, trained_on_gpus
from .report import read_metrics
from .tool_call_tables import comparison_rows, differing, summarize

# Scores are taken from these files of a run's folder.
_TUNED, _TOOL_CALLS = "evaluation/tuned.json", "evaluation/tool_calls.tuned.json"
HELDOUT_SAME = ("heldout_sha256", "tokenizer_sha256", "template", "mask", "control_tokens", "max_length")


@dataclass(frozen=True)
class RunResults:
    """What is read of a finished run.

    Attributes:
        name: Of the run.
        config: Its settings, section by section.
        train: `train.json`.
        metrics: Records of `metrics.jsonl`.
        heldout: What evaluate_model.py wrote about the tuned model.
        tool_calls: What evaluate_tool_calls.py wrote about it; None where the run does not ask for it.
        files: The digest of each file that scores come from, by its path in the run's folder.
        attempts: What each attempt of the training took, see `attempt_costs`.
    """

    name: str
    config: Mapping[str, Any]
    train: Mapping[str, Any]
    metrics: list[dict]
    heldout: Mapping[str, Any]
    tool_calls: Mapping[str, Any] | None
    files: Mapping[str, str]
    attempts: Sequence[Mapping[str, float]] = ()


def read_run(folder: Path) -> RunResults:
    """Reads a run's folder, which names the run.

    Raises:
        UserError: The run is not finished.
    """
    config, train = _read(folder / "config.json"), _read(folder / "train.json")
    names = [_TUNED, *([_TOOL_CALLS] if config["tool_calls"]["enabled"] else [])]
    scores = [_read(folder / name) for name in names]
    return RunResults(
        folder.name,
        config,
        train,
        read_metrics(folder / train["run_folder"] / "metrics.jsonl"),
        scores[0],
        scores[1] if len(scores) > 1 else None,
        {name: sha256_file(folder / name) for name in names},
        attempt_costs(folder / train["run_folder"], train["world_size"]),
    )


def compare(
    runs: Sequence[RunResults], benchmarks: Path | None = None, shared_names: Sequence[str] = ()
) -> dict[str, Any]:
    """Compares runs with the first of them.

    Args:
        runs: At least two.
        benchmarks: Folder of Snakemake's benchmark files; without it there is no cost.
        shared_names: Names there of the data and tokenizers, which runs share.

    Returns:
        baseline: Name of the first run.
        runs: Name, steps, tokens, epochs, digest of the weights, and `files` of each run.
        refused: Mappings `run`, `evaluation` (heldout or tool_calls) and `differs`, the keys that are not the same.
        tables: Mappings `kind` (heldout, calls, losses or plain_text), `scope` and `name`, as in `summarize`, and `rows`:
            `metric` and, by run, `value` and `difference` (`value`, `low`, `high` each; None) and `count`. Rows of
            heldout are datasets, None for all conversations.
        settings: Mappings `key` and `values` by run, of the settings that are not the same in all runs.
        cost: Mappings `run` (None: what they share) and `stages`, the rows of `read_cost`.

    Raises:
        UserError: There are fewer than two, or two of one name.
    """
    names = [run.name for run in runs]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise UserError("there is nothing to compare", found=", ".join(names), expected="two runs or more")
    refused: list[dict[str, Any]] = []
    tables = [_heldout_table(runs, refused), *_tool_call_tables(runs, refused)]
    return {
        "format": 1,
        "baseline": names[0],
        "runs": [
            {"run": run.name, "files": dict(run.files)}
            | {key: run.train[key] for key in ("steps", "tokens", "epochs", "weights_sha256")}
            for run in runs
        ],
        "refused": refused,
        "tables": tables,
        "settings": _differing_settings(runs),
        "cost": _costs(runs, benchmarks, shared_names) if benchmarks else [],
    }


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is missing", expected="a finished run", fix="run `snakemake evaluate` first")
    return read_json(path)


def _heldout_table(runs: Sequence[RunResults], refused: list[dict[str, Any]]) -> dict[str, Any]:
    base = runs[0]
    rows = {name: {} for name in [None, *sorted(base.heldout["datasets"])]}
    for run in runs:
        differs = [key for key in HELDOUT_SAME if base.heldout.get(key) != run.heldout.get(key)]
        before, after = base.heldout.get("conversations"), run.heldout.get("conversations")
        if not differs and not (before and after):
            differs = ["conversations"]  # evaluated by a version that did not write them down
        elif not differs and _tokens(before) != _tokens(after):
            differs = ["max_samples"]
        if differs:
            refused.append({"run": run.name, "evaluation": "heldout", "differs": differs})
        for name in rows:
            measured = run.heldout if name is None else run.heldout["datasets"].get(name)
            if measured is None:
                continue
            value, change = Interval(measured["loss"], None, None), None
            if after:
                value = intervals(loss_ratios(after, name))["loss"]
            if not differs and run is not base:
                _, _, change = compared(loss_ratios(before, name), loss_ratios(after, name))["loss"]
            rows[name][run.name] = _cell(value, change, measured["trained_tokens"])
    return _table("heldout", "all", "", rows)


def _tokens(conversations: Mapping[str, list]) -> dict[str, list[int]]:
    return {name: [tokens for _, tokens in own] for name, own in conversations.items()}


def _tool_call_tables(runs: Sequence[RunResults], refused: list[dict[str, Any]]) -> list[dict[str, Any]]:
    base = runs[0].tool_calls
    tables: dict[tuple[str, str, str], dict[str, dict]] = {}
    for run in runs:
        if run.tool_calls is None:
            continue
        differs = ["tool_calls.enabled"] if base is None else differing(base, run.tool_calls)
        if differs:
            refused.append({"run": run.name, "evaluation": "tool_calls", "differs": differs})
        if differs or run is runs[0]:
            rows = [
                (row, Interval(row["value"], row["low"], row["high"]), None)
                for row in summarize(run.tool_calls)
            ]
        else:
            rows = [(row, row["tuned"], row["difference"]) for row in comparison_rows(base, run.tool_calls)]
        for row, value, change in rows:
            table = tables.setdefault((_kind(row["metric"]), row["scope"], row["name"]), {})
            table.setdefault(row["metric"], {})[run.name] = _cell(value, change, row["count"])
    scopes = ("all", "dataset", "language")
    order = sorted(tables, key=lambda key: (key[0], scopes.index(key[1]), key[2]))
    return [_table(*key, tables[key]) for key in order]


def _kind(metric: str) -> str:
    if metric == "loss.plain_text":
        return "plain_text"
    return "losses" if metric.startswith("loss.") else "calls"


def _cell(value: Interval, difference: Interval | None, count: int) -> dict[str, Any]:
    return {
        "value": value._asdict(),
        "difference": difference and difference._asdict(),
        "count": count,
    }


def _table(kind: str, scope: str, name: str, rows: Mapping[str | None, dict]) -> dict[str, Any]:
    return {
        "kind": kind,
        "scope": scope,
        "name": name,
        "rows": [{"metric": metric, "runs": cells} for metric, cells in rows.items()],
    }


def _differing_settings(runs: Sequence[RunResults]) -> list[dict[str, Any]]:
    flat = [
        {f"{section}.{key}": value for section, values in run.config.items() for key, value in values.items()}
        for run in runs
    ]
    found = []
    for key in dict.fromkeys(key for each in flat for key in each):
        values = [each.get(key) for each in flat]
        if any(value != values[0] for value in values):
            named = {run.name: value for run, value in zip(runs, values, strict=True)}
            found.append({"key": key, "values": named})
    return found


def _costs(runs: Sequence[RunResults], benchmarks: Path, shared_names: Sequence[str]) -> list[dict[str, Any]]:
    costs = [{"run": None, "stages": read_cost(benchmarks, shared_names)}] if shared_names else []
    for run in runs:
        stages = read_cost(benchmarks, [run.name], run.attempts, trained_on_gpus(run.metrics))
        costs.append({"run": run.name, "stages": stages})
    return costs
