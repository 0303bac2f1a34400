"""Reads from a model's config what each layer's attention computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


class UnknownShape(Exception):
    """The config does not say what a layer computes. The message names what is missing."""


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer.

    Attributes:
        query: Total width of the query heads.
        key: Total width of the key heads.
        value: Total width of the heads' outputs.
        window: Most keys per query, or None.
        chunk: Tokens of the blocks that a document is cut into, or None.
    """

    query: int
    key: int
    value: int
    window: int | None = None
    chunk: int | None = None


def attention_shapes(config: PretrainedConfig) -> list[AttentionShape]:
    """Returns the attention of each layer. Layers may differ, as in Gemma 4.

    Args:
        config: The config of the language model, from `get_text_config()`.

    Raises:
        UnknownShape: Some layers are not attention, or the config lacks their sizes.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    foreign = sorted(set(kinds or ()) - _ATTENTION)
    if foreign:
        raise UnknownShape(f"layers of type {', '.join(foreign)}")
    layers = config.per_layer_config
    return [_attention(layer, kinds[number] if kinds else None) for number, layer in enumerate(layers)]


def _attention(layer: Any, kind: str | None) -> AttentionShape:
    heads = _size(layer, "num_attention_heads")
    if getattr(layer, "qk_nope_head_dim", None):  # multi-head latent attention, as in DeepSeek
        query = layer.qk_nope_head_dim + layer.qk_rope_head_dim
        key_heads, value = heads, layer.v_head_dim
    else:
        query = value = getattr(layer, "head_dim", None) or _size(layer, "hidden_size") // heads
        key_heads = getattr(layer, "num_key_value_heads", None) or heads
    window = getattr(layer, "sliding_window", None)
    if kind not in (None, "sliding_attention") or not getattr(layer, "use_sliding_window", True):
        window = None
    chunk = getattr(layer, "attention_chunk_size", None) if kind == "chunked_attention" else None
    return AttentionShape(heads * query, key_heads * query, heads * value, window, chunk)


def _size(layer: Any, name: str) -> int:
    value = getattr(layer, name, None)
    if not isinstance(value, int):
        raise UnknownShape(f"no {name} in its config")
    return value
