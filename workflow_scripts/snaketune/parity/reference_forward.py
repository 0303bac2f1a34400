"""Computes logits in two ways that share no code: from TurboMind's files as the engine reads them, and by transformers.

Both work layer by layer, so they can compare a model much larger than memory. Both compute in fp32 with weights rounded
to the workspace's dtype, so only the order of summation differs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import silu

from snaketune.common.cli import UserError
from snaketune.export.turbomind_folder import FeedForward, Layer, TurboMindFolder
from snaketune.parity.layerwise import Weights, empty_with_buffers, load_as_it_runs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TIE = 1e-3  # difference of probability below which rounding may decide between experts


@torch.inference_mode()
def turbomind_logits(
    folder: TurboMindFolder, ids: torch.Tensor, routes: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Returns the logits (sequences, tokens, vocabulary) of a workspace in fp32.

    Args:
        folder: The workspace.
        ids: int64 (sequences, tokens). Attention is causal, so padding on the right does not change earlier tokens.
        routes: Each layer's experts (sequences, tokens, experts per token) in the model that this one is compared with,
            from `recorded_routes`; empty without.

    Raises:
        UserError: The workspace's router would choose clearly other experts.
    """
    model, attention = folder.config["model_config"], folder.config["attention_config"]
    eps, size = model["norm_eps"], folder.head_size
    frequencies, factor = _rope(attention["rope_param"])
    angles = torch.arange(ids.shape[1]).double()[:, None] * frequencies
    cos, sin = (factor * each.float()[:, None] for each in (angles.cos(), angles.sin()))
    ahead = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    state = folder.embedding()[ids].float()
    for number in range(folder.layers):
        layer = folder.layer(number)
        x = _rms_norm(state, layer.attention_norm, eps)
        q, k, v = (_linear(x, layer, letter).unflatten(-1, (-1, size)) for letter in "qkv")
        if layer.q_norm is not None:
            q, k = _rms_norm(q, layer.q_norm, eps), _rms_norm(k, layer.k_norm, eps)
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        group = folder.heads // folder.kv_heads
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2)) / math.sqrt(size)
        shares = scores.masked_fill(ahead, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", shares, v.repeat_interleave(group, 2)).flatten(2)
        state = state + _linear(mixed, layer, "o")
        x, route = _rms_norm(state, layer.ffn_norm, eps), routes[number] if len(routes) else None
        state = state + _feed_forward(folder, number, layer, x, route)
    return _rms_norm(state, folder.norm(), eps) @ folder.output()[:, : folder.vocab].float()


@torch.inference_mode()
def transformers_logits(
    config: PretrainedConfig, weights: Weights, ids: torch.Tensor, rounded_to: torch.dtype | None = None
) -> torch.Tensor:
    """Returns the logits (sequences, tokens, vocabulary) from transformers in fp32.

    Keeps each layer's weights in memory only while the layer runs.

    Args:
        config: The model's config.
        weights: Its tensors by name; a tied head may be missing.
        ids: int64 (sequences, tokens), padded on the right.
        rounded_to: Rounds every weight to this dtype first; None keeps them unchanged.
    """
    model = empty_with_buffers(config)
    load_as_it_runs(model, weights, rounded_to)
    return model(input_ids=ids, use_cache=False).logits


def _linear(x: torch.Tensor, layer: Any, letter: str) -> torch.Tensor:
    result = x @ getattr(layer, letter).float()
    return result + layer.biases[letter].float() if letter in layer.biases else result


@contextlib.contextmanager
def recorded_routes() -> Iterator[list[torch.Tensor]]:
    """Yields a list that gets the experts (tokens, experts per token) that each router of transformers chooses.

    Two experts may have nearly the same probability. Rounding then decides, differently in another order of summation,
    and all later layers differ. So models are compared with the same experts.
    """
    routes: list[torch.Tensor] = []

    def record(module: torch.nn.Module, _: Any, output: Any) -> None:
        if type(module).__name__.endswith("TopKRouter") and isinstance(output, tuple) and len(output) == 3:
            routes.append(output[2])

    hook = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        yield routes
    finally:
        hook.remove()


def _feed_forward(
    folder: TurboMindFolder, number: int, layer: Layer, x: torch.Tensor, route: torch.Tensor | None
) -> torch.Tensor:
    """Returns the output of a layer's feed-forward block, of its experts, or of both."""
    result = torch.zeros_like(x)
    if layer.dense is not None:
        result = _gated(x, layer.dense)
        if layer.shared_gate is not None:
            result = result * (x @ layer.shared_gate.float()).sigmoid()
    if layer.router is None:
        return result
    model = folder.config["model_config"]
    probabilities = (x @ layer.router.float()).softmax(-1)
    shares, chosen = probabilities.topk(model["experts_per_token"])
    if route is not None and route.shape == chosen.shape:
        missed = (shares.sum(-1) - probabilities.gather(-1, route).sum(-1)).max().item()
        if missed > _TIE:
            raise UserError(
                f"TurboMind's router of layer {number} chooses other experts than the Hugging Face folder's",
                found=f"experts with {missed:.1e} more probability",
                expected=f"at most {_TIE:.0e}, between nearly equal ones",
                fix="do not use this model: its weights or config differ",
            )
        shares, chosen = probabilities.gather(-1, route), route
    if model["norm_topk_prob"]:
        shares = shares / shares.sum(-1, keepdim=True)
    for each in range(folder.experts[number]):
        own = chosen == each
        at = own.any(-1)
        if at.any():
            share = (shares * own).sum(-1, keepdim=True)[at] * model["routed_scale"]
            result[at] += share * _gated(x[at], folder.expert(number, each))
    return result


def _gated(x: torch.Tensor, block: FeedForward) -> torch.Tensor:
    return (silu(x @ block.gate.float()) * (x @ block.up.float())) @ block.down.float()


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of adjacent dimensions (..., tokens, heads, size) by angles (tokens, 1, size / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _rope(rope: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Returns the angle per position of each pair of dimensions (size / 2,), fp64, and the factor of cos and sin.

    `llama3` divides low frequencies by `factor` and interpolates between the two bounds (Llama 3.1's model card). `yarn`
    does the same along the dimensions instead of the frequencies, and scales cos and sin (arXiv 2309.00071).
    """
    plain = float(rope["base"]) ** -(torch.arange(0, rope["dim"], 2).double() / rope["dim"])
    if rope["type"] in ("default", "dynamic"):  # dynamic has no effect within the trained length
        return plain, 1.0
    if rope["type"] == "linear":
        return plain / rope["factor"], 1.0
    if rope["type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (blend + (1 - blend) / rope["factor"]), 1.0
    if rope["type"] == "yarn":
        # The dimensions whose angles turn `beta_fast` and `beta_slow` times within the original length.
        length, base = rope["max_position_embeddings"], rope["base"]
        first, last = (
            rope["dim"] * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (rope["beta_fast"], rope["beta_slow"])
        )
        low, high = max(math.floor(first), 0), min(math.ceil(last), rope["dim"] - 1)
        places = torch.arange(len(plain)).double()
        slow = ((places - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain * (1 - slow + slow / rope["factor"]), rope["attention_factor"]
    raise UserError(
        "no reference implementation for this rope type",
        found=rope["type"],
        expected="default, linear, dynamic, llama3 or yarn",
        fix="set parity.enabled: false, and check the served model's answers yourself",
    )
