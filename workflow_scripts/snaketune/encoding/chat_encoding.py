"""The settings that turn a conversation into token ids, as one value: chat template, mask and control tokens.

Training, evaluation, the parity check and serving must use the same value. A tokenised dataset's manifest records it
in its options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from snaketune.common.cli import UserError
from snaketune.settings.command_line import defaults_of

MASKS = ("compat", "exact")
CONTROL_TOKENS = ("literal", "control", "error")
_FIELDS = ("template", "mask", "control_tokens")
_DEFAULTS = defaults_of("tokenize_dataset")


@dataclass(frozen=True, kw_only=True)
class ChatEncoding:
    """How conversations become token ids, and which ids are trained on.

    Attributes:
        template: A shipped chat template's name or a template file; None for the template saved with the tokenizer.
        mask: "compat" trains on what XTuner trains on, "exact" corrects it.
        control_tokens: What a control token typed in a message becomes: "literal" text, the token ("control"), or an
            "error".

    Raises:
        UserError: `mask` or `control_tokens` is not a valid choice.
    """

    template: str | None = None
    mask: str = _DEFAULTS["mask"]
    control_tokens: str = _DEFAULTS["control_tokens"]

    def __post_init__(self) -> None:
        for name, choices in (("mask", MASKS), ("control_tokens", CONTROL_TOKENS)):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"{name} is out of range", found=value, expected=", ".join(choices))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ChatEncoding:
        """Picks the encoding out of other options, such as a command line's. Missing options get their defaults."""
        return ChatEncoding(**{name: options[name] for name in _FIELDS if name in options})

    @property
    def exact(self) -> bool:
        """True if the mask is exact."""
        return self.mask == "exact"
