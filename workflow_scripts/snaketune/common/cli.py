"""Turns the errors of a command-line script into one clear message and an exit code, without a traceback."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """An error that the user can fix: bad input, a wrong path, an invalid setting.

    Pass `found`, `expected` and `fix` so that every message has the same shape.

    Args:
        what: One line: what went wrong and where (file, line, field).
        found: The value found.
        expected: The value expected.
        fix: The command or change that fixes it. Begins with a verb.

    Attributes:
        found: As given.
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
        self.found = found


def run(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with the code it returns, or 0 for None.

    A `UserError` or a full disk prints one message and exits with 2. If the reader of standard output is gone
    (`| head`), exits silently with 141, the code that a shell reports for a process killed by SIGPIPE.
    """
    try:
        code = main() or 0
    except SystemExit as exit:  # argparse has printed its help or error
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
        # Otherwise Python flushes again at exit and prints an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _code_of(error: OSError) -> int:
    """Returns the exit code for a closed pipe or a full disk (which it reports). Re-raises other errors."""
    if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout.fileno()):
        return 128 + signal.SIGPIPE
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    where = f" ({error.filename})" if error.filename else ""
    print(f"error: {error.strerror}{where}; free some space and run again", file=sys.stderr, flush=True)
    return 2


def _has_no_reader(descriptor: int) -> bool:
    """True if this pipe has no reader. The broken pipe may be one to a worker instead."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
