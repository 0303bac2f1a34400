"""Makes a small model of the same architecture as a base: its twin. It needs the base's config alone, no weights.

A twin has every kind of layer of the base, but few of them, and narrow ones. Windows, chunks and the trained length are
cut too, so that rows of a hundred tokens cross them. Its weights are random, and large enough for each part to matter.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from snaketune.common.cli import UserError

VOCABULARY = 256
WINDOW = 16  # tokens of a window or chunk
TRAINED_LENGTH = 64  # original positions of a rope that depends on length
_EXPERTS = 8
_LARGEST = 250_000_000  # weights of a twin; 1 GB
_CUTS = ("everything", "sizes", "widths", "layers")
_STATE = 16
_CAP = 1.0  # of scores and logits, which then reach it

_LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_blocks)$")
_HEADS = re.compile(
    r"(?<!d_)(?<!dim_)(heads?|n_groups|ngroups|num_query_groups|o_groups|num_attention_heads_per_layer)$"
)
_HEAD_SIZES = re.compile(
    r"(head_dim|dim_head|d_head|headdim|head_size|kv_channels|rotary_dim|query_pre_attn_scalar)$"
)
_WIDTHS = re.compile(
    r"(hidden_size|intermediate_size|d_model|n_embd|ffn_dim|ffn_hidden_size|dim_ff|lora_rank|lru_width|d_ssm|embed_dim"
    r"|emb_dim|n_inner|dff|d_inner|dt_rank|time_step_rank|laurel_rank|embedding_dim|embedding_size|intermediate_size_mlp"
    r"|hidden_size_per_layer_input|feed_forward_size|word_embed_proj_dim|lowrank|norm_rank)$"
)
_FREE_WIDTHS = re.compile(
    r"(intermediate_size|ffn_dim|ffn_hidden_size|dim_ff|n_inner|intermediate_size_mlp)$"
)
_EXPERT_COUNTS = re.compile(r"^(num|n)_(local_|routed_)?experts$|^moe_num_experts$|^zero_expert_num$")
_CHOSEN = re.compile(r"^(num_experts_per_tok(en)?|moe_topk|moe_k|top_k)$")
_GROUPS = re.compile(r"^(n_group|num_expert_group)$")
_STATES = re.compile(r"(d_state|state_size)$")
_WINDOWS = re.compile(
    r"^(sliding_window(_size)?|attention_chunk_size|window_size|attention_window_size|local_attention|keep_window_size"
    r"|index_topk|mamba_chunk_size|chunk_size)$"
)
_VOCABULARIES = re.compile(r"vocab_size")
_RANDOM = re.compile(r"(dropout|pdrop|drop_rate|_drop|jitter)")


def make_twin(
    config: PretrainedConfig, *, longest: int, trust_remote_code: bool, seed: int = 0
) -> PreTrainedModel:
    """Returns a twin in fp32 on the CPU, in eval mode, with transformers' plain attention (`eager`).

    Args:
        config: The base's config, as transformers loads it.
        longest: Tokens of the longest row that will be trained. Decides whether documents can exceed the length that
            the rope was trained for.
        trust_remote_code: Runs Python code that comes with the base.
        seed: Seed of the weights.

    Raises:
        UserError: transformers cannot build the architecture.
    """
    kinds = _layer_kinds(config, trust_remote_code)
    error: Exception | None = None
    for cut in _CUTS:
        try:
            small = twin_config(config, cut, longest, kinds)
            with torch.device("meta"):
                weights = sum(each.numel() for each in build(small, "eager", trust_remote_code).parameters())
            if weights > _LARGEST:
                raise ValueError(f"the smallest model of this architecture has {weights:,} weights")
            model = build(small, "eager", trust_remote_code).eval()
            _randomise(model, seed)
            with torch.no_grad():
                model(torch.arange(WINDOW)[None] + 3, use_cache=False)
        except Exception as caught:  # whatever the model's own code raises for sizes that do not fit
            error = error or caught
            continue
        return model
    raise UserError(
        f"no small model of the architecture {config.model_type} can be run",
        found=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}",
        expected="a causal language model that transformers can run from input_ids alone",
        fix="choose another base model",
    )


def twin_config(
    config: PretrainedConfig, cut: str, longest: int, kinds: list[str] | None
) -> PretrainedConfig:
    """Returns the config of a twin.

    Args:
        config: The base's config.
        cut: What is cut besides layers, experts and the vocabulary: `everything`, `sizes` (not the numbers of heads),
            `widths` (only those of MLPs) or `layers` (nothing else).
        longest: See `make_twin`.
        kinds: The kind of each of the base's layers, see `_layer_kinds`; None if unknown.
    """
    values = config.to_dict()
    text = values
    if config.get_text_config() is not config:
        name = next(name for name, each in vars(config).items() if each is config.get_text_config())
        text = values[name]
        for each, part in values.items():
            if isinstance(part, dict) and each != name:
                _cut_layers(part, 1)
    own = config.get_text_config()
    layers = own.num_hidden_layers
    _cut_layers(text, min(layers, max(_prefix(kinds), 2) if kinds else 4), layers)
    by_heads, by_size = _factors(text) if cut in ("everything", "sizes") else (1, 1)
    by_heads = by_heads if cut == "everything" else 1
    for name, value in list(text.items()):
        text[name] = _cut(name, value, by_heads, by_size, cut)
    _cut_rope(text, own, by_size, longest)
    for part in (values, text):
        for name in (
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "decoder_start_token_id",
            "sep_token_id",
        ):
            if part.get(name) is not None:
                part[name] = {"pad_token_id": 0, "bos_token_id": 1}.get(name, 2)
        if "output_router_logits" in part:
            part["output_router_logits"] = False  # the router's loss is not part of the proof
    values.pop("quantization_config", None)
    return type(config).from_dict(values)


def layer_list(model: nn.Module) -> nn.ModuleList | None:
    """Returns a model's decoder layers: its longest list of modules with parts, the outermost of equally long ones."""
    lists = [
        (name, each)
        for name, each in model.named_modules()
        if isinstance(each, nn.ModuleList)
        and len(each)
        and len(list(each[0].children())) > 1
        and ".experts" not in name
    ]
    return max(lists, key=lambda pair: (len(pair[1]), -pair[0].count(".")), default=("", None))[1]


def build(config: PretrainedConfig, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    """Returns a model in fp32 with the random weights that its own code draws."""
    config = copy.deepcopy(config)  # else models would share the attention that is stored in it
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=trust_remote_code
    )


def _layer_kinds(config: PretrainedConfig, trust_remote_code: bool) -> list[str] | None:
    """Returns a text for each layer of the base, equal for layers of the same structure and settings.

    Looks at the layers of the whole model, built without memory for its weights.
    """
    try:
        with torch.device("meta"):
            model = build(config, "eager", trust_remote_code)
    except Exception:  # some architectures compute with their weights when they are built
        return None
    found = layer_list(model)
    return found and [_kind(layer) for layer in found]


def _kind(layer: nn.Module) -> str:
    parts = []
    for name, module in layer.named_modules():
        flags = {
            key: value if isinstance(value, bool | str) else value is None
            for key, value in vars(module).items()
            if not key.startswith("_")
            and (isinstance(value, bool | str) or key in ("sliding_window", "window_size"))
        }
        if not re.search(r"\d", name.rpartition(".")[2]):  # not each of many experts
            parts.append(f"{name} {type(module).__name__} {sorted(flags.items())}")
    return "\n".join(parts)


def _prefix(kinds: list[str]) -> int:
    """Returns how many first layers have all kinds of layers."""
    return max(kinds.index(kind) for kind in set(kinds)) + 1


def _cut_layers(values: dict[str, Any], kept: int, layers: int | None = None) -> None:
    for name, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool) and _LAYERS.search(name):
            values[name] = min(value, kept)
            layers = layers or value
    for name, value in values.items():
        if isinstance(value, list) and len(value) == layers and layers > 1:
            values[name] = value[:kept]
        elif name == "per_layer_config" and isinstance(value, dict):
            values[name] = {layer: each for layer, each in value.items() if int(layer) < kept}
    if values.get("num_kv_shared_layers"):
        values["num_kv_shared_layers"] = min(values["num_kv_shared_layers"], max(kept - 2, 0))


def _factors(values: dict[str, Any]) -> tuple[int, int]:
    """Returns the divisors of numbers of heads and of head sizes. A width is divided by both, so products stay equal."""
    counts = [n for name, n in _integers(values) if _HEADS.search(name) and n > 1]
    sizes = [n for name, n in _integers(values) if _HEAD_SIZES.search(name)]
    if not sizes:
        heads = next(
            (n for name, n in _integers(values) if re.search(r"(attention_heads|n_heads?|num_heads)$", name)),
            1,
        )
        width = next(
            (n for name, n in _integers(values) if re.search(r"^(hidden_size|d_model|n_embd)$", name)), heads
        )
        sizes = [width // heads]
    by_heads = math.gcd(*counts) if counts else 1
    by_size = math.gcd(*sizes)
    least = min(sizes)
    by_heads = 1 if by_heads == min(counts, default=1) and by_heads % 2 else by_heads
    by_heads = by_heads // 2 if counts and min(counts) == by_heads and by_heads > 1 else by_heads
    by_size = max(
        (d for d in range(1, by_size + 1) if by_size % d == 0 and least // d >= 16 and least // d % 8 == 0),
        default=1,
    )
    return by_heads, by_size


def _integers(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in values.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int) and not isinstance(each, bool):
                yield name, each


def _cut(name: str, value: Any, by_heads: int, by_size: int, cut: str) -> Any:
    if isinstance(value, float) and _RANDOM.search(name):
        return 0.0
    if isinstance(value, float) and "softcap" in name:
        return min(value, _CAP)
    if isinstance(value, float) and name == "attention_multiplier":
        return value * by_size
    if isinstance(value, list) and value and isinstance(value[0], int) and not isinstance(value[0], bool):
        if _HEADS.search(name) or _WIDTHS.search(name):
            return [_cut(name, each, by_heads, by_size, cut) for each in value]
        return value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if _VOCABULARIES.search(name) and "type" not in name:
        return min(value, VOCABULARY)
    if _EXPERT_COUNTS.search(name):
        return min(value, _EXPERTS)
    if _CHOSEN.search(name):
        return min(value, 2)
    if _GROUPS.search(name):
        return min(value, 2)
    if name == "topk_group":
        return 1
    if _WINDOWS.search(name):
        return min(value, WINDOW)
    if cut == "widths" and _FREE_WIDTHS.search(name):
        return min(value, 128)
    if cut not in ("everything", "sizes"):
        return value
    if _STATES.search(name):
        return min(value, _STATE)
    if _HEADS.search(name):
        return max(value // by_heads, 1)
    if _HEAD_SIZES.search(name):
        return max(value // by_size, 1)
    if _WIDTHS.search(name):
        return (
            -(-value // (by_heads * by_size * 8)) * 8
        )  # a multiple of 8, which grouped matrix products need
    return value


def _cut_rope(text: dict[str, Any], own: PretrainedConfig, by_size: int, longest: int) -> None:
    """Cuts the trained length of a rope that depends on length, and the lists with one number per frequency."""
    for parameters in rope_parameters(text):
        for name, value in list(parameters.items()):
            if isinstance(value, list) and name.endswith("_factor"):
                parameters[name] = value[: max(len(value) // by_size, 1)]
            elif isinstance(value, list) and name == "mrope_section":
                parts = [max(each // by_size, 1) for each in value]
                parts[-1] += sum(value) // by_size - sum(parts)
                parameters[name] = parts
        kind = parameters.get("rope_type")
        trained = trained_length(parameters, own)
        if kind in ("dynamic", "longrope") and trained:
            limit = TRAINED_LENGTH if longest > trained else 2 * TRAINED_LENGTH
            for holder in (parameters, text):
                if "original_max_position_embeddings" in holder:
                    holder["original_max_position_embeddings"] = limit
            text["max_position_embeddings"] = limit * max(text["max_position_embeddings"] // trained, 1)


def rope_parameters(text: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rope's settings in a config's values: one dictionary, or one for each type of layer."""
    found = text.get("rope_parameters") or text.get("rope_scaling") or {}
    nested = [each for each in found.values() if isinstance(each, dict)]
    return nested or ([found] if found else [])


def trained_length(parameters: dict[str, Any], config: PretrainedConfig) -> int | None:
    """Returns the length in tokens beyond which a dynamic or longrope rope changes its frequencies."""
    names = ("original_max_position_embeddings", "max_position_embeddings")
    found = [parameters.get(names[0]), *(getattr(config, name, None) for name in names)]
    return next((each for each in found if each), None)


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draws weights so that logits have a standard deviation of about one, and no parameter is neutral."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter is embedding:
                parameter.copy_(noise * 0.5)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.1)
