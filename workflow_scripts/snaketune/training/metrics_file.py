"""metrics.jsonl: one JSON line per optimizer step. A kill may tear the last line, which is then ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snaketune.common.files import write_bytes


def whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields the lines of a metrics file, raw and parsed, up to the first torn one; none without a file."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            values = json.loads(line)
            values["step"]
        except (ValueError, KeyError):
            return
        yield line, values


def last_step(path: Path) -> int:
    """Returns the last step in a metrics file, or 0."""
    return max((values["step"] for _, values in whole_lines(path)), default=0)


def cut_metrics(path: Path, step: int) -> None:
    """Removes the lines after `step` and a torn last line from a metrics file."""
    if not path.is_file():
        return
    kept = []
    for line, values in whole_lines(path):
        if values["step"] > step:
            break
        kept.append(line)
    write_bytes(path, b"".join(kept))
