"""What a program shows on a terminal."""

from __future__ import annotations

import os


def read_terminal(ours: int, theirs: int) -> bytes:
    """Returns what is written to a pseudo-terminal until the last program that has its other end is gone.

    Args:
        ours: The end that is read; closed at the end.
        theirs: The end that the program was started with; closed at once.
    """
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # how a terminal ends
        pass
    os.close(ours)
    return shown
