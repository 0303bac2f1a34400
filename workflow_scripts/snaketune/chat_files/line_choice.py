"""Which lines of a JSONL file are held out, and which go to the valid folder: by content, so duplicates stay together."""

from __future__ import annotations

import hashlib

from snaketune.common.cli import UserError


def is_held_out(line: bytes, share: float, seed: int) -> bool:
    """True if this line of a JSONL file is set aside for evaluation.

    A line is, when the first 8 bytes of SHA-256 of `<seed>:<line>`, read as a fraction, are less than `share`.

    Args:
        line: The line's bytes; line breaks at its end do not count.
        share: Between 0 and 1.
        seed: Another seed sets other lines aside.
    """
    return share > 0 and _fraction(b"%d:" % seed, line) < share


def is_valid(line: bytes, share: float, seed: int) -> bool:
    """True if `valid: holdout` moves this line to the valid folder.

    Decided as by `is_held_out`, over `valid:<seed>:<line>`: with equal seeds, too, the two choices are independent.
    """
    return _fraction(b"valid:%d:" % seed, line) < share


def check_share(share: float, name: str = "held-out") -> None:
    """Raises a UserError unless 0 <= share < 1."""
    if not 0 <= share < 1:
        raise UserError(
            f"the {name} share is out of range", found=share, expected="0 <= share < 1", fix="use 0.05"
        )


def _fraction(salt: bytes, line: bytes) -> float:
    return int.from_bytes(hashlib.sha256(salt + line.rstrip(b"\r\n")).digest()[:8], "big") / 2**64
