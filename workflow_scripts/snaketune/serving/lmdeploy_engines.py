"""The architectures of lmdeploy's two engines, and the longest context that its TurboMind engine serves correctly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# From lmdeploy >= 0.14, lmdeploy/turbomind/supported_models.py. Others run on its PyTorch engine.
TURBOMIND_ARCHITECTURES = (
    "LlamaForCausalLM",
    "InternLM2ForCausalLM",
    "InternLM3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
    "GptOssForCausalLM",
)
# From lmdeploy 0.16.0, lmdeploy/pytorch/models/module_map.py: those that generate text from text.
PYTORCH_ARCHITECTURES = (
    "BaichuanForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "DeepseekV4ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GlmMoeDsaForCausalLM",
    "InternLMForCausalLM",
    "Llama4ForConditionalGeneration",
    "MiniCPM3ForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "PhiMoEForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "Starcoder2ForCausalLM",
)
# Windows and their defaults where config.json has no such key, from transformers.
_ALL_LAYERS = {"MistralForCausalLM": 4096, "MixtralForCausalLM": None}
_OPTIONAL = ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
_WINDOW, _FULL_LAYERS = 4096, 28


def architecture_of(config: Mapping[str, Any]) -> str:
    """Returns the name of the model's class in a config.json."""
    return (config.get("architectures") or ["none named"])[0]


def ignored_window(config: Mapping[str, Any]) -> int | None:
    """Returns the sliding window of a model's attention that TurboMind ignores.

    TurboMind computes full attention for all architectures except gpt-oss. Up to the window, this is the same.

    Args:
        config: A parsed config.json.

    Returns:
        The window in tokens; None if the model has none, or none that is shorter than its positions.
    """
    window, positions = _window(config), config.get("max_position_embeddings")
    return None if window and positions and window >= positions else window


def _window(config: Mapping[str, Any]) -> int | None:
    architecture = architecture_of(config)
    if architecture in _ALL_LAYERS:
        return config.get("sliding_window", _ALL_LAYERS[architecture])
    if architecture not in _OPTIONAL or not config.get("use_sliding_window"):
        return None
    if config.get("layer_types"):
        slides = "sliding_attention" in config["layer_types"]
    else:
        # transformers 4 and 5 disagree on which layers of a mixture slide, so any window counts there.
        first = 0 if "Moe" in architecture else config.get("max_window_layers", _FULL_LAYERS)
        slides = first < config["num_hidden_layers"]
    return config.get("sliding_window", _WINDOW) if slides else None


def longest_session(config: Mapping[str, Any]) -> int | None:
    """Returns the longest context in tokens that TurboMind serves as the model was made: its window, or all positions.

    None if config.json has neither.
    """
    limits = [ignored_window(config), config.get("max_position_embeddings")]
    return min((limit for limit in limits if limit), default=None)


def session_length(config: Mapping[str, Any], wanted: int | None) -> int | None:
    """Returns the `--session-len` for a Hugging Face folder in lmdeploy >= 0.10; None leaves it to lmdeploy.

    Args:
        config: A parsed config.json.
        wanted: The user's own length.
    """
    return wanted or (ignored_window(config) if architecture_of(config) in TURBOMIND_ARCHITECTURES else None)


def as_llama(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of the equivalent Llama for a Mistral config without a sliding window; others unchanged."""
    if config.get("model_type") != "mistral" or ignored_window(config) is not None:
        return config
    llama = {key: value for key, value in config.items() if key != "sliding_window"}
    llama |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return llama | {"attention_bias": False, "mlp_bias": False}
