"""Presents InternLM2's weights and config as those of an equivalent Llama.

InternLM2 (arXiv 2403.17297) is a Llama with different names whose q, k and v share one matrix, `wqkv`: for each KV head
its query heads, then the key head, then the value head. transformers has no code for it, and we do not run the code in
its folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

ARCHITECTURE = "InternLM2ForCausalLM"
_NAMES = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class LlamaWeights(Mapping[str, torch.Tensor]):
    """InternLM2's tensors under Llama's names, each created on access.

    Args:
        weights: Tensors by InternLM2's names.
        config: The parsed config.json.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]):
        self._weights = weights
        self._kv_heads = config["num_key_value_heads"]
        self._group = config["num_attention_heads"] // self._kv_heads
        self._sources: dict[str, tuple[str, str | None]] = {}
        for name in weights:
            if ".attention.wqkv." in name:
                for letter in "qkv":
                    part = name.replace("attention.wqkv", f"self_attn.{letter}_proj")
                    self._sources[part] = name, letter
            else:
                self._sources[_llama_name(name)] = name, None

    def __getitem__(self, name: str) -> torch.Tensor:
        source, letter = self._sources[name]
        tensor = self._weights[source]
        if letter is None:
            return tensor
        heads = tensor.unflatten(0, (self._kv_heads, self._group + 2, -1))
        first, last = {"q": (0, -2), "k": (-2, -1), "v": (-1, None)}[letter]
        return heads[:, first:last].flatten(0, 2)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the Llama that is equivalent to an InternLM2 with this config.json."""
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "bias")}
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False}
    return kept | llama | {"attention_bias": bool(config.get("bias", False))}


def _llama_name(name: str) -> str:
    if name.startswith("output."):
        return name.replace("output.", "lm_head.")
    return re.sub("|".join(map(re.escape, _NAMES)), lambda match: _NAMES[match[0]], name)
