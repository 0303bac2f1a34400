"""The schema of all settings, rules/schemas/config.schema.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

try:  # LibYAML reads the schema in 0.05 s, for which every script waits; the loader in Python takes 0.3 s.
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeLoader

SCHEMA = Path(__file__).resolve().parents[3] / "rules" / "schemas" / "config.schema.yaml"


@cache
def load_schema() -> dict[str, Any]:
    """Returns the JSON schema (kept in YAML); do not change it."""
    return yaml.load(SCHEMA.read_text(encoding="utf-8"), Loader=SafeLoader)
