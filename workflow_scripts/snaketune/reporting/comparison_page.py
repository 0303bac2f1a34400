"""Renders one self-contained page that compares runs, from `run_comparison.compare` and the runs' metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from snaketune.reporting.page import page_template
from snaketune.reporting.plots import run_curves
from snaketune.reporting.report_words import EVALUATIONS


def render_comparison(comparison: Mapping[str, Any], metrics: Sequence[list[dict]]) -> str:
    """Returns the page as HTML.

    Args:
        comparison: From `compare`.
        metrics: Records of each run's `metrics.jsonl`, in the same order.
    """
    from markupsafe import Markup

    tables = {
        kind: [table for table in comparison["tables"] if table["kind"] == kind]
        for kind in ("heldout", "calls", "losses", "plain_text")
    }
    curves = [Markup(run_curves(metrics, key)) for key in ("step", "tokens")]  # noqa: S704 - our own SVG
    return page_template("comparison.html.j2").render(
        title=f"{len(comparison['runs'])} runs",
        comparison=comparison,
        names=[run["run"] for run in comparison["runs"]],
        first={kind: found[0]["rows"] if found else [] for kind, found in tables.items()},
        tables=tables,
        evaluations=EVALUATIONS,
        curves=curves if any(metrics) else [],
        costs=_cost_rows(comparison["cost"]),
    )


def _cost_rows(costs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Regroups the costs by stage, the total first; each row maps runs to their cost."""
    stages: dict[str | None, dict[str | None, dict]] = {}
    for cost in costs:
        for row in cost["stages"]:
            stages.setdefault(row["stage"], {})[cost["run"]] = row
    return [{"stage": stage, "runs": runs} for stage, runs in stages.items()]
