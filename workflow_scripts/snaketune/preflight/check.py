"""A preflight check: its name, result and fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snaketune.common.cli import UserError


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: What was checked.
        passed: True if the check passed.
        found: One line for people.
        fix: What to do if the check failed.
    """

    name: str
    passed: bool
    found: str
    fix: str | None = None


def attempt(name: str, check: Callable[[], Check]) -> Check:
    """Runs a check; if it raises, returns a failed check with the error's message."""
    try:
        return check()
    except UserError as error:
        what, _, rest = str(error).partition("\n")
        return Check(name, False, what, " ".join(rest.split()) or None)
    except Exception as error:  # a broken machine can raise anything
        return Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0])
