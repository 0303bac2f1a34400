"""The sections of a configuration, and the error for unknown keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from snaketune.common.cli import UserError

SECTIONS = (
    "model",
    "tokenizer",
    "data",
    "tokenize",
    "heldout",
    "packing",
    "preflight",
    "train",
    "cluster",
    "hf",
    "turbomind",
    "parity",
    "evaluate",
    "tool_calls",
    "opencompass",
    "forecast",
)


def unknown_key(full: str, key: str, known: Iterable[str]) -> UserError:
    """Returns the error for an unknown key, with the most similar known key."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    fix = f"did you mean {near[0]!r}?" if near else "remove it; docs/config.md lists every key"
    return UserError(f"config: unknown key {full}", expected="one of " + ", ".join(known), fix=fix)
