"""The schema of all settings, rules/schemas/config.schema.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

try:  # every script waits for it: 0.05 s with LibYAML, 0.3 s in pure Python
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeLoader

SCHEMA = Path(__file__).resolve().parents[3] / "rules" / "schemas" / "config.schema.yaml"


@cache
def load_schema() -> dict[str, Any]:
    """Returns the JSON schema (stored as YAML). Callers must not change it."""
    return yaml.load(SCHEMA.read_text(encoding="utf-8"), Loader=SafeLoader)


def default_of(key: str) -> Any:
    """Returns the default of a setting, such as `train.max_skipped_steps`."""
    rule = load_schema()
    for name in key.split("."):
        rule = rule["properties"][name]
    return rule["default"]
