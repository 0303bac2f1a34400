"""Prints a tree of records as text and verifies its digests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from snaketune.common.cli import UserError
from snaketune.provenance.record import Check, Record


class Mismatch(NamedTuple):
    """A digest that no longer matches; `found` is None if the file is gone."""

    check: Check
    found: str | None
    record: Record


def tree_lines(record: Record) -> Iterator[str]:
    """Yields the tree as text, one line per record or fact. A repeated record is expanded only once."""
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
    """Returns an iterator over the records of a tree, each once."""
    found: dict[int, Record] = {}

    def walk(each: Record) -> None:
        if id(each) not in found:
            found[id(each)] = each
            for source in each.sources:
                walk(source)

    walk(record)
    return iter(found.values())


def verify(record: Record) -> tuple[int, list[Mismatch]]:
    """Recomputes every digest of a tree.

    Returns:
        The number of digests computed, and those that do not match.
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
