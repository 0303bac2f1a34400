"""Compares runs: figures of each with intervals, and paired differences from the first run.

A difference uses the same draws of the same held-out conversations for both runs. If two runs were evaluated
on different conversations or with different options, there is no difference, and `refused` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snaketune.common import result_paths as names
from snaketune.common.cli import UserError
from snaketune.common.files import sha256_file
from snaketune.common.run_files import RunFiles
from snaketune.reporting.bootstrap import Interval, compared, intervals, loss_ratios
from snaketune.reporting.cost import read_cost, run_cost
from snaketune.reporting.tool_call_tables import SCOPES, comparison_rows, differing, summarize

_TUNED, _TOOL_CALLS = (pattern.format(label="tuned") for pattern in (names.EVALUATION, names.TOOL_CALLS))
HELDOUT_SAME = ("heldout_sha256", "tokenizer_sha256", "template", "mask", "control_tokens", "max_length")


def compare(
    runs: Sequence[RunFiles], benchmarks: Path | None = None, shared_names: Sequence[str] = ()
) -> dict[str, Any]:
    """Compares runs with the first one.

    Args:
        runs: At least two. Reads their settings, train.json, metrics and evaluations of the tuned model.
        benchmarks: Folder of Snakemake's benchmark files; without it, costs are left out.
        shared_names: Names of benchmark files of the shared data and tokenizers.

    Returns:
        baseline: Name of the first run.
        runs: Name, steps, tokens, epochs, digest of the weights, and `files` of each run.
        refused: Mappings with `run`, `evaluation` (heldout or tool_calls) and `differs`, the keys that
            differ.
        tables: Mappings with `kind` (heldout, calls, losses or plain_text), `scope` and `name`, as in
            `summarize`, and `rows`: `metric` and, by run, `value` and `difference` (each with `value`, `low`,
            `high`, or None) and `count`. Rows of heldout are datasets, None for all conversations.
        settings: Mappings with `key` and `values` by run, for the settings that differ.
        cost: Mappings with `run` (None: shared) and `stages`, the rows of `read_cost`.

    Raises:
        UserError: There are fewer than two runs, two have the same name, or one is not finished.
    """
    given = [run.name for run in runs]
    if len(set(given)) < 2 or len(set(given)) < len(given):
        raise UserError("nothing to compare", found=", ".join(given), expected="at least two runs")
    refused: list[dict[str, Any]] = []
    tables = [_heldout_table(runs, refused), *_tool_call_tables(runs, refused)]
    return {
        "format": 1,
        "baseline": given[0],
        "runs": [
            {"run": run.name, "files": _digests(run)}
            | {key: run.train[key] for key in ("steps", "tokens", "epochs", "weights_sha256")}
            for run in runs
        ],
        "refused": refused,
        "tables": tables,
        "settings": _differing_settings(runs),
        "cost": _costs(runs, benchmarks, shared_names) if benchmarks else [],
    }


def _tool_calls(run: RunFiles) -> dict[str, Any] | None:
    return run.read(_TOOL_CALLS) if run.config["tool_calls"]["enabled"] else None


def _digests(run: RunFiles) -> dict[str, str]:
    """Returns the digests of the files that a run's scores come from, by name."""
    scored = [_TUNED] if _tool_calls(run) is None else [_TUNED, _TOOL_CALLS]
    return {name: sha256_file(run.path(name)) for name in scored}


def _heldout_table(runs: Sequence[RunFiles], refused: list[dict[str, Any]]) -> dict[str, Any]:
    base = runs[0].read(_TUNED)
    rows = {name: {} for name in [None, *sorted(base["datasets"])]}
    for run in runs:
        result = run.read(_TUNED)
        differs = [key for key in HELDOUT_SAME if base.get(key) != result.get(key)]
        before, after = base.get("conversations"), result.get("conversations")
        if not differs and not (before and after):
            differs = ["conversations"]  # evaluated by a version that did not record them
        elif not differs and _tokens(before) != _tokens(after):
            differs = ["max_samples"]
        if differs:
            refused.append({"run": run.name, "evaluation": "heldout", "differs": differs})
        for name in rows:
            measured = result if name is None else result["datasets"].get(name)
            if measured is None:
                continue
            value, change = Interval(measured["loss"], None, None), None
            if after:
                value = intervals(loss_ratios(after, name))["loss"]
            if not differs and run is not runs[0]:
                _, _, change = compared(loss_ratios(before, name), loss_ratios(after, name))["loss"]
            rows[name][run.name] = _cell(value, change, measured["trained_tokens"])
    return _table("heldout", "all", "", rows)


def _tokens(conversations: Mapping[str, list]) -> dict[str, list[int]]:
    return {name: [tokens for _, tokens in own] for name, own in conversations.items()}


def _tool_call_tables(runs: Sequence[RunFiles], refused: list[dict[str, Any]]) -> list[dict[str, Any]]:
    base = _tool_calls(runs[0])
    tables: dict[tuple[str, str, str], dict[str, dict]] = {}
    for run in runs:
        result = _tool_calls(run)
        if result is None:
            continue
        differs = ["tool_calls.enabled"] if base is None else differing(base, result)
        if differs:
            refused.append({"run": run.name, "evaluation": "tool_calls", "differs": differs})
        if differs or run is runs[0]:
            rows = [(row, Interval(row["value"], row["low"], row["high"]), None) for row in summarize(result)]
        else:
            rows = [(row, row["tuned"], row["difference"]) for row in comparison_rows(base, result)]
        for row, value, change in rows:
            table = tables.setdefault((_kind(row["metric"]), row["scope"], row["name"]), {})
            table.setdefault(row["metric"], {})[run.name] = _cell(value, change, row["count"])
    order = sorted(tables, key=lambda key: (key[0], SCOPES.index(key[1]), key[2]))
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


def _differing_settings(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
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


def _costs(runs: Sequence[RunFiles], benchmarks: Path, shared_names: Sequence[str]) -> list[dict[str, Any]]:
    costs = [{"run": None, "stages": read_cost(benchmarks, shared_names)}] if shared_names else []
    for run in runs:
        costs.append({"run": run.name, "stages": run_cost(run, benchmarks, [run.name])})
    return costs
