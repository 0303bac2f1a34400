"""The edge between a thin command-line script and a person: one clear error, no traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: bad input, a wrong path, a setting that cannot work.

    Build it with `found`, `expected` and `fix` so that every message has the same shape.

    Args:
        what: One line that says what is wrong and where (file, line, field).
        found: What was there.
        expected: What should have been there.
        fix: What to type or change next.
    """

    def __init__(self, what: str, *, found: object = None, expected: object = None, fix: str | None = None):
        lines = [what]
        if found is not None:
            lines.append(f"  found:    {found}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if fix is not None:
            lines.append(f"  to fix:   {fix}")
        super().__init__("\n".join(lines))


def run(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits: 0 when it returns None, 2 with the message alone on a `UserError` or a full disk."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}; free some space and run again", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)
