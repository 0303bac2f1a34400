"""Chooses the lines to hold out and the lines for the valid folder, by content, so that duplicates stay together."""

from __future__ import annotations

import hashlib

from snaketune.common.cli import UserError


def is_held_out(line: bytes, share: float, seed: int) -> bool:
    """True if a line of a JSONL file is held out for evaluation.

    Compares the first 8 bytes of the SHA-256 of `<seed>:<line>`, read as a fraction, with `share`.

    Args:
        line: The line's bytes; line breaks at its end are ignored.
        share: Share of lines to hold out, from 0 to below 1.
        seed: Selects which lines are held out.
    """
    return share > 0 and _fraction(b"%d:" % seed, line) < share


def is_valid(line: bytes, share: float, seed: int) -> bool:
    """True if `valid: holdout` moves this line to the valid folder.

    Works like `is_held_out`, but hashes `valid:<seed>:<line>`: the choices are independent even with equal seeds.
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
