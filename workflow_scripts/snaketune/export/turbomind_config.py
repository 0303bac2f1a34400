"""Compares the settings in a TurboMind workspace's config.yaml with those in the Hugging Face config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snaketune.export.hf_config import rope_of

WEIGHTS = Path("triton_models") / "weights"
DEFAULT_ROPE_BASE = 10000.0  # lmdeploy's and transformers' default


def head_size(hf_config: dict[str, Any]) -> int | None:
    """Returns the size of an attention head, None if the config does not give it."""
    heads, width = hf_config.get("num_attention_heads"), hf_config.get("hidden_size")
    return hf_config.get("head_dim") or (width // heads if heads and width else None)


def shared_settings(hf_config: dict[str, Any], written: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the settings that every convertible model has: {name: (in config.json, in config.yaml)}.

    The rope base is the usual error: transformers 5 saves it in `rope_parameters`, which lmdeploy does not read; it
    then writes 10,000.
    """
    model, rope = written["model_config"], written["attention_config"]["rope_param"]
    base, scaling = rope_of(hf_config)
    heads = hf_config["num_attention_heads"]
    return {
        "rope_theta": (DEFAULT_ROPE_BASE if base is None else base, float(rope["base"])),
        "rope_type": (scaling.get("rope_type", "default"), rope["type"]),
        "head_size": (head_size(hf_config), model["size_per_head"]),
        "layers": (hf_config["num_hidden_layers"], model["num_layer"]),
        "attention_heads": (heads, model["head_num"]),
        # With fewer KV heads than GPUs, lmdeploy writes each head several times.
        "kv_heads": (
            max(hf_config.get("num_key_value_heads") or heads, model["attn_tp_size"]),
            model["kv_head_num"],
        ),
        "vocab_size": (hf_config["vocab_size"], model["vocab_size"]),
        "hidden_size": (hf_config["hidden_size"], model["hidden_units"]),
    }
