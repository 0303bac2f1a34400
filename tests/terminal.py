"""Reads the output of a program on a terminal."""

from __future__ import annotations

import os


def read_terminal(ours: int, theirs: int) -> bytes:
    """Returns the output to a pseudo-terminal, until all programs that use it have ended.

    Args:
        ours: The end to read from; closed at the end.
        theirs: The end that the program uses; closed at once.
    """
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # a terminal signals its end this way
        pass
    os.close(ours)
    return shown
