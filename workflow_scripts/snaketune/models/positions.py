"""How long a document a model was made for: its positions, learned or computed, and its windows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from snaketune.common.cli import UserError

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")


@dataclass(frozen=True)
class Positions:
    """The lengths in tokens that matter to a model.

    Attributes:
        limit: Positions that the base was made for; None if its config does not tell.
        learned: True if each position has its own weights, so that longer documents cannot be computed.
        window: The smallest window or chunk of a layer; None if all layers see the whole document.
    """

    limit: int | None
    learned: bool
    window: int | None

    def require(self, longest: int) -> None:
        """Raises a UserError if a document of `longest` tokens has positions without weights."""
        if self.learned and self.limit and longest > self.limit:
            raise UserError(
                "documents are longer than the base's learned positions",
                found=f"a document of {longest:,} tokens",
                expected=f"at most {self.limit:,}",
                fix=f"set data.max_tokens or train.max_length to at most {self.limit}",
            )


def read_positions(model: PreTrainedModel) -> Positions:
    """Returns the lengths that a model was made for. Its weights are not read; they may be on the meta device."""
    config = model.config.get_text_config()
    limit = next((value for name in _LIMITS if (value := getattr(config, name, None))), None)
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding)]
    # Some tables have two more rows, for padding.
    learned = limit is not None and any(
        0 <= each.num_embeddings - limit <= 2 for each in tables if each is not model.get_input_embeddings()
    )
    windows = [value for name in _WINDOWS if isinstance(value := getattr(config, name, None), int)]
    if getattr(config, "use_sliding_window", True) is False:
        windows = []
    return Positions(limit, learned, min(windows, default=None))
