"""A check of the preflight: its name, its result and its fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snaketune.common.cli import UserError


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        name: What was looked at.
        passed: Whether it is as it has to be.
        found: One line for people.
        fix: What to do when it did not pass.
    """

    name: str
    passed: bool
    found: str
    fix: str | None = None


def attempt(name: str, check: Callable[[], Check]) -> Check:
    """Runs a check; an error in it is a check that did not pass, with the error's words."""
    try:
        return check()
    except UserError as error:
        what, _, rest = str(error).partition("\n")
        return Check(name, False, what, " ".join(rest.split()) or None)
    except Exception as error:  # whatever a machine can come up with
        return Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0])
