"""Reads files of prompts. Imports only packages that both environments have."""

from __future__ import annotations

import json
from pathlib import Path

from snaketune.common.cli import UserError


def read_prompts(path: Path) -> list[list[dict]]:
    """Reads a JSON list of conversations, each a list of messages as in the data, without the answer.

    Raises:
        UserError: The file is not a list of conversations.
    """
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the prompts in {path}", found=error, expected="a JSON file") from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, list) for prompt in prompts):
        raise UserError(
            f"{path} is not a list of conversations",
            expected='[[{"role": "user", "content": "..."}], ...]',
            fix="wrap each prompt in a list of messages",
        )
    return prompts
