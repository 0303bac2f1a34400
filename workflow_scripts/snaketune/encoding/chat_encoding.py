"""How a conversation becomes token ids: chat template, loss mask and control tokens, as one value.

Training, evaluation, the conversions' gate and serving have to agree on it. The options in a tokenised dataset's manifest
hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from snaketune.common.cli import UserError

MASKS = ("compat", "exact")
CONTROL_TOKENS = ("literal", "control", "error")
_FIELDS = ("template", "mask", "control_tokens")


@dataclass(frozen=True, kw_only=True)
class ChatEncoding:
    """How conversations become token ids, and which of these are trained on.

    Attributes:
        template: Name of a shipped chat template, or path of a template file; None for the one saved with the tokenizer.
        mask: "compat" trains on what XTuner trains on, "exact" corrects it.
        control_tokens: A control token typed inside a message becomes "literal" text, the token ("control"), or an
            "error".

    Raises:
        UserError: The mask or control_tokens is none of its choices.
    """

    template: str | None = None
    mask: str = "compat"
    control_tokens: str = "literal"

    def __post_init__(self) -> None:
        for name, choices in (("mask", MASKS), ("control_tokens", CONTROL_TOKENS)):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"{name} is out of range", found=value, expected=", ".join(choices))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ChatEncoding:
        """Returns the encoding among other options, such as those of a command line; what is missing is the default."""
        return ChatEncoding(**{name: options[name] for name in _FIELDS if name in options})

    @property
    def exact(self) -> bool:
        """True if the mask is exact."""
        return self.mask == "exact"
