"""Proves that a TurboMind workspace matches its Hugging Face folder: every weight, the config and the logits.

Converters fail silently. So an independent reader (`turbomind_folder.py`) reads the workspace back and compares it bit
for bit in Hugging Face's layout. config.yaml is compared with config.json. A forward pass on the engine's matrices, in
its rotary layout, must give the same logits as transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from snaketune.checkpoints.safetensors_files import open_safetensors
from snaketune.common.cli import UserError
from snaketune.common.files import read_json
from snaketune.common.progress import Progress
from snaketune.export import internlm2
from snaketune.export.hf_folder import require_model_folder
from snaketune.export.turbomind_config import (
    MIXTURES,
    dense_size,
    mixture_settings,
    padded,
    shared_settings,
)
from snaketune.export.turbomind_folder import TurboMindFolder, same_bits
from snaketune.export.turbomind_limits import PROVED_ARCHITECTURES
from snaketune.parity.mixtures import FusedExperts
from snaketune.parity.reference_forward import recorded_routes, transformers_logits, turbomind_logits
from snaketune.serving.lmdeploy_engines import architecture_of

# Between two fp32 evaluations of the same function that differ in the order of summation.
LARGEST_DIFFERENCE = 1e-4
TOKENS = 64


def prove(hf: Path, turbomind: Path, forward: bool = True) -> dict[str, Any]:
    """Compares a workspace with the Hugging Face folder that it was made from.

    Args:
        hf: Hugging Face folder with safetensors.
        turbomind: TurboMind workspace with 16-bit weights.
        forward: Also compares the logits of random ids.

    Returns:
        {"format", "architecture", "dtype", "tp", "tensors", "weights_bytes", "config": {name: value}}, and with
        `forward` {"forward": {"tokens", "relative_difference", "largest_difference", "top1_agreement"}}

    Raises:
        UserError: Anything differs; names the first ten tensors or fields that do.
    """
    hf_config = read_json(require_model_folder(hf) / "config.json")
    architecture = architecture_of(hf_config)
    if architecture not in PROVED_ARCHITECTURES:
        raise UserError(
            "cannot prove the TurboMind layout of this architecture",
            found=architecture,
            expected=", ".join(PROVED_ARCHITECTURES),
            fix="set parity.enabled: false, and check the served model's answers yourself",
        )
    folder = TurboMindFolder(turbomind)
    weights: Mapping[str, torch.Tensor] = open_safetensors(hf)
    if architecture == internlm2.ARCHITECTURE:
        weights, hf_config = internlm2.LlamaWeights(weights, hf_config), internlm2.llama_config(hf_config)
    config = compare_config(hf_config, folder)
    tensors = compare_weights(weights, folder, hf_config)
    return {
        "format": 1,
        "architecture": architecture,
        "dtype": str(folder.dtype).removeprefix("torch."),
        "tp": folder.tp,
        "tensors": tensors,
        "weights_bytes": sum((folder.weights / name).stat().st_size for name in folder.read),
        "config": config,
    } | ({"forward": _compare_forward(hf_config, weights, folder)} if forward else {})


def _compare_forward(
    hf_config: dict[str, Any], weights: Mapping[str, torch.Tensor], folder: TurboMindFolder
) -> dict[str, Any]:
    from transformers import AutoConfig

    tokens = min(TOKENS, folder.session_len)
    ids = torch.randint(folder.vocab, (1, tokens), generator=torch.Generator().manual_seed(0))
    config = AutoConfig.for_model(**hf_config)
    if architecture_of(hf_config) in MIXTURES:
        weights = FusedExperts(weights, hf_config)
    with recorded_routes() as routes:
        expected = transformers_logits(config, weights, ids, folder.dtype)
    found = turbomind_logits(folder, ids, [route.unflatten(0, ids.shape) for route in routes])
    return {"tokens": tokens, **compare_logits(expected, found, "TurboMind", "the Hugging Face folder")}


def compare_weights(weights: Mapping[str, torch.Tensor], folder: TurboMindFolder, hf_config: dict) -> int:
    """Compares every weight bit for bit in the workspace's dtype, and returns their number.

    Raises:
        UserError: A tensor differs or is missing on one side.
    """
    left = {name for name in weights if not name.endswith("rotary_emb.inv_freq")}
    wrong, tensors = [], 0
    total = 2 + len(left)
    found = folder.hf_tensors(hf_config)
    progress = Progress("tensors", total)
    for name, tensor in found:
        progress.add("weights", tensors=1)
        source = "model.embed_tokens.weight" if name == "lm_head.weight" and name not in left else name
        if source not in weights:
            # If q, k and v have biases, lmdeploy also writes one for `wo`. It must be zero.
            if name.endswith("o_proj.bias") and not tensor.count_nonzero():
                continue
            wrong.append(f"{name}: not in the Hugging Face folder")
            continue
        left.discard(source)
        tensors += 1
        wrong += _difference(name, weights[source].to(folder.dtype), tensor)
    progress.finish()
    wrong += [f"{name}: not in the TurboMind folder" for name in sorted(left)]
    wrong += [f"{name}: file does not belong to any weight" for name in folder.unread()]
    if wrong:
        raise _differ("weights", wrong)
    return tensors


def compare_config(hf_config: dict[str, Any], folder: TurboMindFolder) -> dict[str, Any]:
    """Compares config.yaml with config.json and returns the fields that agree.

    Raises:
        UserError: A field differs.
    """
    model, attention = folder.config["model_config"], folder.config["attention_config"]
    rope = attention["rope_param"]
    length = hf_config.get("max_position_embeddings", 0)
    pairs = shared_settings(hf_config, folder.config) | mixture_settings(hf_config, folder.config)
    pairs |= {
        "rope_size": (folder.head_size, rope["dim"]),
        "intermediate_size": (
            [padded(dense_size(hf_config), folder.tp)] * folder.layers,
            folder.inner_sizes,
        ),
        "norm_eps": (hf_config["rms_norm_eps"], model["norm_eps"]),
        "max_position_embeddings": (length, attention["max_position_embeddings"]),
        "softmax_scale": (
            0.0,
            float(attention["softmax_scale"]),
        ),  # 0: the engine's default, 1 / sqrt(head size)
        "attention_bias": (_has_bias(hf_config), bool(model["attn_bias"])),
    }
    wrong = [
        f"{name}: {ours} in config.json, {theirs} in config.yaml"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if wrong:
        raise _differ("configs", wrong)
    return {name: theirs for name, (_, theirs) in pairs.items()}


def compare_logits(
    expected: torch.Tensor,
    found: torch.Tensor,
    what: str,
    source: str,
    limit: float = LARGEST_DIFFERENCE,
    fix: str = "do not use this model: its weights or config differ",
) -> dict[str, float]:
    """Compares two sets of logits (..., vocabulary) and returns their differences.

    Raises:
        UserError: They differ by more than `limit`, by default what fp32 rounding explains; advises `fix`.
    """
    expected, found = expected.double(), found.double()
    relative = ((found - expected).norm() / expected.norm()).item()
    if not relative <= limit:
        raise UserError(
            f"{what} gives different logits than {source}",
            found=f"relative difference {relative:.2e}",
            expected=f"at most {limit:.0e}",
            fix=fix,
        )
    return {
        "relative_difference": relative,
        "largest_difference": (found - expected).abs().max().item(),
        "top1_agreement": (found.argmax(-1) == expected.argmax(-1)).double().mean().item(),
    }


def _has_bias(hf_config: dict[str, Any]) -> bool:
    architecture = architecture_of(hf_config)
    if architecture == "Qwen2MoeForCausalLM":
        return bool(hf_config.get("qkv_bias", True))
    return architecture == "Qwen2ForCausalLM" or bool(hf_config.get("attention_bias", False))


def _difference(name: str, expected: torch.Tensor, found: torch.Tensor) -> list[str]:
    if expected.shape != found.shape:
        return [f"{name}: {list(expected.shape)} in Hugging Face, {list(found.shape)} in TurboMind"]
    if same_bits(expected, found):
        return []
    places = (expected.contiguous().view(torch.int16) != found.contiguous().view(torch.int16)).nonzero()
    place = tuple(places[0].tolist())
    return [
        f"{name}: {len(places)} of {expected.numel()} values differ, first at {list(place)}: "
        f"{expected[place].item()} in Hugging Face, {found[place].item()} in TurboMind"
    ]


def _differ(what: str, wrong: Iterable[str]) -> UserError:
    wrong = list(wrong)
    more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
    return UserError(
        f"the {what} of the TurboMind and the Hugging Face folder differ",
        found="".join(f"\n    {line}" for line in wrong[:10] + more),
        fix="do not serve this model; convert again",
    )
