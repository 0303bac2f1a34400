"""Chooses a prompt that reaches beyond a model's attention window, where readers of its config may differ.

The fixed prompts are short: a reader that forgets a window of 4,096 tokens gives the same logits for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from snaketune.parity.model_logits import Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BEYOND = 64  # tokens after the limit, whose logits are compared
MOST_TOKENS = 8192 + BEYOND
MOST_OPERATIONS = 1e14  # of a forward pass: about a quarter of an hour on two cores
MOST_SCORES = 4 << 30  # bytes of attention scores, which only `eager` holds
_WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")
_GROWING = ("longrope", "su", "dynamic")  # kinds of rope that change beyond the original length


def limits_of(config: PretrainedConfig) -> dict[str, int]:
    """Returns the lengths after which a model computes differently, by their names in its config."""
    text = config.get_text_config().to_dict()
    ropes = [text.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    ropes += [each for rope in ropes for each in rope.values() if isinstance(each, Mapping)]
    limits = {name: text.get(name) for name in _WINDOWS}
    if text.get("use_sliding_window") is False:
        limits.pop("sliding_window")
    if any(rope.get("rope_type", rope.get("type")) in _GROWING for rope in ropes):
        name = "original_max_position_embeddings"
        known = [part[name] for part in (text, *ropes) if part.get(name)]
        limits |= {name: known[0]} if known else {"max_position_embeddings": text["max_position_embeddings"]}
    return {name: limit for name, limit in limits.items() if limit}


def reachable_length(config: PretrainedConfig, parameters: int, eager: bool) -> int | None:
    """Returns the tokens of a prompt that passes the largest limit within reach, None if there is none.

    Args:
        config: The model's config.
        parameters: Number of its parameters.
        eager: True if attention holds all scores of a layer.
    """
    heads = getattr(config.get_text_config(), "num_attention_heads", None) or 1
    lengths = {limit + BEYOND for limit in limits_of(config).values()}
    return max(
        (
            length
            for length in lengths
            if length <= MOST_TOKENS
            and 2 * parameters * length <= MOST_OPERATIONS
            and (not eager or 8 * heads * length**2 <= MOST_SCORES)
        ),
        default=None,
    )


def long_batch(prompts: Sequence[Sequence[int]], length: int) -> Batch:
    """Returns a random prompt of the tokens of others. Its last `BEYOND` tokens are wanted.

    Args:
        prompts: Their ids are those to choose from.
        length: Tokens of the result.
    """
    known = torch.tensor(sorted({each for prompt in prompts for each in prompt}))
    chosen = torch.randint(len(known), (1, length), generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(1, length, dtype=torch.bool)
    wanted[:, -BEYOND:] = True
    return Batch(known[chosen], wanted)
