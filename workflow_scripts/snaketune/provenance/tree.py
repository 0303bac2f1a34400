"""A tree of records as text, and the records that no longer hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from snaketune.common.cli import UserError
from snaketune.provenance.record import Check, Record


class Mismatch(NamedTuple):
    """A digest that no longer holds; `found` is None where the file has gone."""

    check: Check
    found: str | None
    record: Record


def tree_lines(record: Record) -> Iterator[str]:
    """Yields the tree, a line a record and a line a fact; what stands in it twice is told once."""
    yield from _lines(record, "", "", set())


def _lines(record: Record, first: str, rest: str, seen: set[int]) -> Iterator[str]:
    path = f"  {_short(record.path)}" if record.path else ""
    again = id(record) in seen and bool(record.facts or record.sources)
    yield f"{first}{record.title}{path}{'  (see above)' if again else ''}"
    if again:
        return
    seen.add(id(record))
    for name, value in record.facts:
        bar = "\u2502 " if record.sources else "  "
        yield f"{rest}{bar}  {name}: {value}"
    for place, source in enumerate(record.sources):
        last = place + 1 == len(record.sources)
        branch, under = ("\u2514\u2500 ", "   ") if last else ("\u251c\u2500 ", "\u2502  ")
        yield from _lines(source, rest + branch, rest + under, seen)


def all_records(record: Record) -> Iterator[Record]:
    """Yields each record of a tree once."""
    found: dict[int, Record] = {}

    def walk(each: Record) -> None:
        if id(each) not in found:
            found[id(each)] = each
            for source in each.sources:
                walk(source)

    walk(record)
    return iter(found.values())


def verify(record: Record) -> tuple[int, list[Mismatch]]:
    """Computes every digest of a tree again.

    Returns:
        How many were computed, and those that do not hold.
    """
    count, wrong = 0, []
    for each in all_records(record):
        for check in each.checks:
            count += 1
            try:
                found = check.compute()
            except (OSError, UserError):
                found = None
            if found != check.recorded:
                wrong.append(Mismatch(check, found, each))
    return count, wrong


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
