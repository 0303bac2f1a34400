"""The edge between a thin command-line script and a person: one clear error, no traceback."""

from __future__ import annotations

import errno
import os
import select
import signal
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
    """Runs `main` and exits: 0 when it returns None, 2 with the message alone on a `UserError` or a full disk.

    When the reader of standard output has gone (`| head`), it exits quietly with 141, as a shell reports of a tool that
    SIGPIPE ended.
    """
    try:
        code = main() or 0
    except SystemExit as exit:  # argparse has printed its help
        code = exit.code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except OSError as error:
        code = _code_of(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _code_of(error)
        # Otherwise Python tries once more at its end, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _code_of(error: OSError) -> int:
    """Returns the exit code for a closed pipe or a full disk, and prints a message for the latter; raises any other."""
    if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout.fileno()):
        return 128 + signal.SIGPIPE
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    where = f" ({error.filename})" if error.filename else ""
    print(f"error: {error.strerror}{where}; free some space and run again", file=sys.stderr, flush=True)
    return 2


def _has_no_reader(descriptor: int) -> bool:
    """Whether this is the pipe that was closed; a script has others, to its workers."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
