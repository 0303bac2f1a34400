"""Refuses models that lmdeploy cannot serve correctly. Reads config.json alone, so it takes no time before a run.

The limits of `turbomind.mode: convert` are those of lmdeploy 0.9.2.post1: its converter
(lmdeploy/turbomind/deploy, supported_models.py) and its engine (src/turbomind: attention for heads of size 64 and 128,
rotary embeddings, the router of experts). Those of `direct` are the ones that its later releases share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snaketune.common.cli import UserError
from snaketune.common.files import read_json
from snaketune.export.hf_config import rope_of
from snaketune.export.turbomind_config import MIXTURES, expert_number, head_size, rope_numbers
from snaketune.serving.lmdeploy_engines import (
    PYTORCH_ARCHITECTURES,
    TURBOMIND_ARCHITECTURES,
    architecture_of,
    as_llama,
    ignored_window,
)

# Converted, and proved by `turbomind_proof.py`.
PROVED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "InternLM2ForCausalLM",
    *MIXTURES,
)
# lmdeploy's converter accepts these too.
UNPROVED_ARCHITECTURES = (
    "BaiChuanForCausalLM",
    "BaichuanForCausalLM",
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
    "DeepseekV2ForCausalLM",
    "InternLM3ForCausalLM",
    "InternLMForCausalLM",
    "InternLMXComposer2ForCausalLM",
    "InternS1ForConditionalGeneration",
    "InternVLChatModel",
    "InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaLlamaForCausalLM",
    "LlavaMistralForCausalLM",
    "MiniCPMV",
    "MolmoForCausalLM",
    "MultiModalityCausalLM",
    "QWenLMHeadModel",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
)
HEAD_SIZES = (64, 128)
# lmdeploy's check divides the hidden size by the number of heads, whatever `head_dim` says.
_DIVIDED_HEADS = ("LlamaForCausalLM", "Qwen2ForCausalLM")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
MOST_EXPERTS, MOST_EXPERTS_PER_TOKEN = 160, 8
_BIASES = {
    "LlamaForCausalLM": ("attention_bias", "mlp_bias"),
    "InternLM2ForCausalLM": ("bias",),
}
_OFF = "set turbomind.enabled: false, and serve the Hugging Face folder"


def base_config(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the config.json of a run's base; None for a hub model that is not on this machine yet.

    Args:
        model: The run's `model` settings.

    Raises:
        UserError: The file is not JSON.
    """
    if model["path"] is not None:
        path = Path(model["path"]) / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(model["hub"], "config.json")
        if not isinstance(path, str):
            return None
    try:
        return read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", fix="download the base model again") from None


def check_run(name: str, run: Mapping[str, Any]) -> None:
    """Checks a run's TurboMind settings against its base, as far as the base is on this machine.

    Args:
        name: The run's name.
        run: Its settings by section.

    Raises:
        UserError: See `check_limits`, or OpenCompass would use a longer context than TurboMind can.
    """
    config = base_config(run["model"]) if run["turbomind"]["enabled"] else None
    if config is None:
        return
    subject = f"config: run {name!r}: "
    check_limits(config, run["turbomind"], subject, proved=run["parity"]["enabled"])
    tests, window = run["opencompass"], _ignored_window(config, run["turbomind"]["mode"])
    if not window or not tests["enabled"] or tests["backend"] != "turbomind":
        return
    for key in ("max_seq_len", *(["longtext_max_seq_len"] if "longtext" in tests["groups"] else [])):
        if tests[key] > window:
            raise UserError(
                f"{subject}OpenCompass on TurboMind would go beyond the model's sliding window",
                found=f"opencompass.{key}: {tests[key]}",
                expected=f"at most {window}, as TurboMind has no sliding window",
                fix=f"set opencompass.{key}: {window}, or opencompass.backend: hf",
            )


def check_limits(config: Mapping[str, Any], settings: Mapping[str, Any], subject: str, proved: bool) -> None:
    """Raises a `UserError` if lmdeploy cannot serve a model, or would compute something else than the model does.

    Args:
        config: The model's parsed config.json.
        settings: `mode`, `tp` and `session_len` of the `turbomind` section.
        subject: Begins each message.
        proved: Only architectures that `turbomind_proof.py` covers.
    """
    if settings["mode"] == "direct":
        _check_direct(config, subject)
        if _runs_on_turbomind(config):
            _check_engine(config, subject)
            _check_yarn_factor(config, subject)
    else:
        _check_architecture(config, subject, proved)
        _check_engine(config, subject)
        _check_converter(config, subject)
    _check_gpus(config, settings["tp"], subject)
    window = _ignored_window(config, settings["mode"])
    _check_session(settings["session_len"], window, config.get("max_position_embeddings"), subject)


def _runs_on_turbomind(config: Mapping[str, Any]) -> bool:
    """True if lmdeploy >= 0.10 is told to serve this model on TurboMind."""
    return architecture_of(as_llama(dict(config))) in TURBOMIND_ARCHITECTURES


def _ignored_window(config: Mapping[str, Any], mode: str) -> int | None:
    return ignored_window(config) if mode == "convert" or _runs_on_turbomind(config) else None


def _check_direct(config: Mapping[str, Any], subject: str) -> None:
    architecture = architecture_of(config)
    if architecture not in TURBOMIND_ARCHITECTURES + PYTORCH_ARCHITECTURES:
        raise UserError(
            f"{subject}none of lmdeploy's engines has this architecture",
            found=architecture,
            expected=f"one of {', '.join(sorted({*TURBOMIND_ARCHITECTURES, *PYTORCH_ARCHITECTURES}))}",
            fix=_OFF + " with vLLM or SGLang",
        )


def _check_architecture(config: Mapping[str, Any], subject: str, proved: bool) -> None:
    architecture = architecture_of(config)
    known = PROVED_ARCHITECTURES if proved else PROVED_ARCHITECTURES + UNPROVED_ARCHITECTURES
    if architecture in known:
        return
    newer = architecture in TURBOMIND_ARCHITECTURES + PYTORCH_ARCHITECTURES
    advice = "set turbomind.mode: direct for lmdeploy 0.10 and later, or turbomind.enabled: false"
    advice = advice if newer else _OFF + " with vLLM or SGLang"
    if architecture in UNPROVED_ARCHITECTURES:
        what = "no proof covers TurboMind files of this architecture"
        advice = f"set parity.enabled: false to convert it unproved, or {advice.removeprefix('set ')}"
    else:
        what = "TurboMind of lmdeploy 0.9.2.post1 does not support this architecture"
    raise UserError(
        f"{subject}{what}",
        found=architecture,
        expected="one of " + ", ".join(sorted(known)),
        fix=advice,
    )


def _check_engine(config: Mapping[str, Any], subject: str) -> None:
    """Checks head size and rope."""
    size, sizes = head_size(config), HEAD_SIZES
    if architecture_of(config) == "InternLM2ForCausalLM":
        sizes = (128,)  # lmdeploy's reader of InternLM2 knows no other
    if size is not None and size not in sizes:
        raise UserError(
            f"{subject}TurboMind does not support this size of attention heads",
            found=f"heads of size {size}",
            expected="heads of size " + " or ".join(map(str, sizes)),
            fix=_OFF,
        )
    parameters = config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UserError(f"{subject}TurboMind does not support a rope that differs by layer", fix=_OFF)
    _, scaling = rope_of(dict(config))
    kind = scaling.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UserError(
            f"{subject}TurboMind does not support this rope type",
            found=kind,
            expected=", ".join(ROPE_TYPES),
            fix=_OFF,
        )
    share = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise UserError(
            f"{subject}TurboMind turns all dimensions of a head",
            found=f"partial_rotary_factor {share}",
            expected="1.0",
            fix=_OFF,
        )
    if kind == "yarn" and not scaling.get("truncate", True):
        raise UserError(
            f"{subject}TurboMind rounds the bounds of yarn",
            found="truncate: false",
            expected="true",
            fix=_OFF,
        )
    try:
        rope_numbers(config)
    except KeyError as error:
        raise UserError(
            f"{subject}config.json has a {kind} rope without {error.args[0]}",
            fix="add it to the base's config.json",
        ) from None


def _check_yarn_factor(config: Mapping[str, Any], subject: str) -> None:
    """Checks that the factor is what lmdeploy computes instead of reading it."""
    _, scaling = rope_of(dict(config))
    original = scaling.get("original_max_position_embeddings")
    if scaling.get("rope_type") != "yarn" or not original:
        return
    factor, computed = scaling["factor"], config["max_position_embeddings"] / original
    if factor != computed:
        raise UserError(
            f"{subject}lmdeploy would use another yarn factor than the model",
            found=f"factor {factor}; max_position_embeddings / original_max_position_embeddings is {computed:g}",
            expected="the same number",
            fix="set turbomind.mode: convert, which writes the model's own factor, or turbomind.enabled: false",
        )


def _check_converter(config: Mapping[str, Any], subject: str) -> None:
    """Checks what the converter assumes without looking."""
    architecture = architecture_of(config)
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if architecture in _DIVIDED_HEADS and heads and width and width // heads not in HEAD_SIZES:
        raise UserError(
            f"{subject}lmdeploy's converter refuses a {architecture} whose hidden_size / num_attention_heads "
            "is neither 64 nor 128",
            found=f"{width} / {heads} = {width // heads}, although the heads have size {head_size(config)}",
            fix="set turbomind.mode: direct for lmdeploy 0.10 and later, or turbomind.enabled: false",
        )
    for name in _BIASES.get(architecture, ()):
        if config.get(name):
            raise UserError(
                f"{subject}lmdeploy's converter leaves out the biases of a {architecture}",
                found=f"{name}: true",
                expected="false",
                fix=_OFF,
            )
    if config.get("hidden_act", "silu") != "silu" and architecture in PROVED_ARCHITECTURES:
        raise UserError(
            f"{subject}TurboMind does not support this activation function",
            found=config["hidden_act"],
            expected="silu",
            fix=_OFF,
        )
    if architecture in MIXTURES:
        _check_mixture(config, subject)


def _check_mixture(config: Mapping[str, Any], subject: str) -> None:
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    if dense or step != 1:
        raise UserError(
            f"{subject}lmdeploy's converter takes every layer for a mixture of experts",
            found=f"mlp_only_layers: {dense}, decoder_sparse_step: {step}",
            expected="experts in every layer",
            fix=_OFF,
        )
    experts, used = expert_number(config), config.get("num_experts_per_tok")
    if experts is None or used is None:
        raise UserError(
            f"{subject}config.json does not give the number of experts",
            expected=f"{MIXTURES[architecture_of(config)].experts} and num_experts_per_tok",
            fix="add them to the base's config.json",
        )
    if experts > MOST_EXPERTS or used > MOST_EXPERTS_PER_TOKEN:
        raise UserError(
            f"{subject}TurboMind does not support so many experts",
            found=f"{experts} experts, {used} per token",
            expected=f"at most {MOST_EXPERTS} experts, {MOST_EXPERTS_PER_TOKEN} per token",
            fix=_OFF,
        )


def _check_gpus(config: Mapping[str, Any], tp: int, subject: str) -> None:
    heads = config.get("num_attention_heads") or 0
    kv_heads = config.get("num_key_value_heads") or heads
    width = config.get("hidden_size") or 0
    even = kv_heads and (kv_heads % tp == 0 or tp % kv_heads == 0) if tp > 0 else False
    if tp < 1 or tp & (tp - 1) or heads % tp or width % tp or (heads and not even):
        raise UserError(
            f"{subject}turbomind.tp does not fit this model",
            found=f"tp {tp}; {heads} attention heads, {kv_heads} KV heads, hidden size {width}",
            expected="a power of two that divides heads and hidden size, and divides the KV heads or is a multiple",
            fix="set turbomind.tp: 1, or another that fits",
        )


def _check_session(wanted: int | None, window: int | None, positions: int | None, subject: str) -> None:
    limit = window or positions
    if wanted and limit and wanted > limit:
        why = "sliding window, which TurboMind does not have" if window else "max_position_embeddings"
        raise UserError(
            f"{subject}turbomind.session_len is too long for this model",
            found=wanted,
            expected=f"at most {limit}: the model's {why}",
            fix=f"set turbomind.session_len: {limit}, or leave it empty",
        )
