"""Shared by all pages: the template engine and the number formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from snaketune.reporting.report_words import CHECKPOINT_FIGURES, LABELS, METRICS, ROLES, STAGES, translated

_TEMPLATES = Path(__file__).parent / "templates"


def page_template(name: str):
    """Returns a page template; it escapes every text from outside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    page = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters.update(
        number=_number, fixed=_fixed, percent=_percent, share=_share, value=_value, duration=_duration
    )
    page.globals.update(t=translated, metrics=METRICS, roles=ROLES, stages=STAGES)
    page.globals["checkpoint_figures"] = {
        name: (each, LABELS[each]) for name, each in CHECKPOINT_FIGURES.items()
    }
    return page.get_template(name)


def _number(value: float | None) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _fixed(value: float | None, digits: int = 4, sign: bool = False) -> str:
    if value is None:
        return "n/a"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _share(value: float | None, sign: bool = False) -> str:
    """Formats a share as a percentage; `sign` is for differences."""
    if value is None:
        return "n/a"
    return f"{100 * value:{'+' if sign else ''}.1f}%".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _value(value: Any) -> str:
    """Formats a setting as in YAML."""
    if value is None:
        return "not set"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | dict) else str(value)
