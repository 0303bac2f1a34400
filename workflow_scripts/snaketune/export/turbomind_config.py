"""Translates a Hugging Face config.json into the settings of a TurboMind workspace's config.yaml, and compares the two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketune.export.hf_config import rope_of
from snaketune.serving.lmdeploy_engines import architecture_of, longest_session

WEIGHTS = Path("triton_models") / "weights"
DEFAULT_ROPE_BASE = 10000.0  # lmdeploy's and transformers' default


@dataclass(frozen=True)
class Mixture:
    """Names in a mixture of experts' config.json and tensors.

    Attributes:
        experts, inner_size: Keys of the number of experts and of their feed-forward size.
        block: Name of the layer's module that has the experts and the router.
        parts: Names of an expert's gate, up and down projections.
        shared_size: Key of the feed-forward size of the shared expert, None if there is none.
        always_normalised: The weights of a token's experts sum to 1, whatever `norm_topk_prob` says.
    """

    experts: str
    inner_size: str
    block: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_size: str | None = None
    always_normalised: bool = False


MIXTURES = {
    "MixtralForCausalLM": Mixture(
        "num_local_experts",
        "intermediate_size",
        block="block_sparse_moe",
        parts=("w1", "w3", "w2"),
        always_normalised=True,
    ),
    "Qwen2MoeForCausalLM": Mixture(
        "num_experts", "moe_intermediate_size", shared_size="shared_expert_intermediate_size"
    ),
    "Qwen3MoeForCausalLM": Mixture("num_experts", "moe_intermediate_size"),
}


def head_size(hf_config: Mapping[str, Any]) -> int | None:
    """Returns the size of an attention head, None if the config does not give it."""
    heads, width = hf_config.get("num_attention_heads"), hf_config.get("hidden_size")
    return hf_config.get("head_dim") or (width // heads if heads and width else None)


def expert_number(hf_config: Mapping[str, Any]) -> int | None:
    """Returns the number of experts of a mixture, None if the config does not give it.

    transformers 5 saves it under another name than 4 for some architectures.
    """
    key = MIXTURES[architecture_of(hf_config)].experts
    names = [name for name in (key, "num_experts", "num_local_experts") if name in hf_config]
    return hf_config[names[0]] if names else None


def rope_numbers(hf_config: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a scaled rope under config.yaml's names, as transformers reads config.json.

    yarn's attention factor follows `_compute_yarn_parameters` in transformers.modeling_rope_utils (arXiv 2309.00071).
    """
    _, scaling = rope_of(dict(hf_config))
    positions = hf_config.get("max_position_embeddings")
    kind = scaling.get("rope_type", "default")
    if kind == "yarn":
        factor = scaling["factor"]
        attention = scaling.get("attention_factor")
        if attention is None:
            scales = scaling.get("mscale"), scaling.get("mscale_all_dim")
            above, below = scales if all(scales) else (1, 0)
            attention = _yarn_scale(factor, above) / _yarn_scale(factor, below)
        return {
            "factor": factor,
            "max_position_embeddings": scaling.get("original_max_position_embeddings") or positions,
            "attention_factor": attention,
            "beta_fast": scaling.get("beta_fast") or 32,
            "beta_slow": scaling.get("beta_slow") or 1,
        }
    names = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }.get(kind, ())
    numbers = {name: scaling[name] for name in names}
    return numbers | ({"max_position_embeddings": positions} if kind == "dynamic" else {})


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def converter_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Returns config.json with what lmdeploy 0.9.2 reads under the names that it knows.

    It takes a rope base that it does not find for 10,000, and an empty `head_dim` for no size at all.
    """
    base, scaling = rope_of(hf_config)
    config = hf_config | {"torch_dtype": hf_config.get("torch_dtype") or hf_config.get("dtype")}
    config["rope_scaling"] = {name: value for name, value in scaling.items() if value is not None} or None
    config |= {} if base is None else {"rope_theta": base}
    config |= {} if head_size(config) is None else {"head_dim": head_size(config)}
    mixture = MIXTURES.get(architecture_of(config))
    return config | ({mixture.experts: expert_number(config)} if mixture else {})


def shared_settings(hf_config: dict[str, Any], written: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the settings that every convertible model has: {name: (in config.json, in config.yaml)}.

    The rope base is the usual error: transformers 5 saves it in `rope_parameters`, which lmdeploy does not read; it
    then writes 10,000.
    """
    model, rope = written["model_config"], written["attention_config"]["rope_param"]
    base, scaling = rope_of(hf_config)
    heads = hf_config["num_attention_heads"]
    session = model["session_len"]
    pairs = {
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
        # A shorter session is the user's choice. In a longer one, attention reaches beyond the model's window.
        "session_len": (min(session, longest_session(hf_config) or session), session),
    }
    return pairs | {
        f"rope_{name}": (value, rope.get(name)) for name, value in rope_numbers(hf_config).items()
    }


def mixture_settings(hf_config: dict[str, Any], written: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the settings of a mixture of experts like `shared_settings`; none for other models."""
    mixture, model = MIXTURES.get(architecture_of(hf_config)), written["model_config"]
    if mixture is None:
        return {}
    layers, tp = hf_config["num_hidden_layers"], model["mlp_tp_size"]
    normalised = mixture.always_normalised or bool(hf_config.get("norm_topk_prob"))
    return {
        "experts": ([expert_number(hf_config)] * layers, list(model["expert_num"])),
        "expert_size": (padded(hf_config[mixture.inner_size], tp), model["expert_inter_size"]),
        "experts_per_token": (hf_config["num_experts_per_tok"], model["experts_per_token"]),
        "normalised_experts": (normalised, bool(model["norm_topk_prob"])),
        "shared_expert_gate": (mixture.shared_size is not None, bool(model["moe_shared_gate"])),
        "routed_scale": (1.0, float(model["routed_scale"])),
        "router": ("greedy", model["topk_method"]),
    }


def dense_size(hf_config: Mapping[str, Any]) -> int:
    """Returns the size of a layer's feed-forward block beside its experts; 0 if there are only experts."""
    mixture = MIXTURES.get(architecture_of(hf_config))
    key = "intermediate_size" if mixture is None else mixture.shared_size
    return hf_config[key] if key else 0


def padded(size: int, tp: int) -> int:
    """Returns a size rounded up to a multiple of the number of GPUs."""
    return -(-size // tp) * tp
