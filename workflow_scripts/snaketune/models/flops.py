"""Counts the FLOPs of a training step and the peak FLOPs of a device, for model FLOPs utilisation (MFU).

A step's FLOPs are those that the model needs, regardless of what is recomputed or skipped:

- 6 x parameters per token: 2 for the multiply-add of the forward pass, 4 for the gradients of inputs and weights
  (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). A frozen parameter (LoRA) has no weight gradient: 4. In a mixture
  of experts, only the experts that a token passes through count. Lookups in the input embedding need no arithmetic; the
  head counts for trained tokens.
- 6 x layers x heads x head size x (sum over documents of tokens squared): queries with their keys, half of all pairs
  since attention is causal, at 2 x 2 FLOPs forward (scores, and the sum of values) and twice that backward. PaLM's
  12 x L x H x Q x T (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) counts both halves, and one document that
  fills the sequence. Packed documents do not attend to each other, so each counts separately. Layers count by their own
  heads; a sliding window or a chunk limits the keys of a query.

The FLOPs of recurrent layers are not known here, so their models have no MFU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from snaketune.models.attention_shapes import UnknownShape, attention_shapes

# Dense 16-bit matrix TFLOP/s from the data sheets (V100: float16). The first name found in the device's name counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800 PCIe": 756.0,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L20": 119.5,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
    "MI250X": 191.5,  # one of its two dies; torch sees each as a device
}


def peak_tflops(device_name: str, dtype: torch.dtype) -> float | None:
    """Returns a device's peak TFLOP/s, or None for an unknown device or a dtype that is not 16-bit.

    Args:
        device_name: From `torch.cuda.get_device_name()`, e.g. `NVIDIA H100 80GB HBM3`.
        dtype: The dtype of the arithmetic.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if name.lower() in device_name.lower()), None)


@dataclass(frozen=True)
class ModelFlops:
    """The FLOPs of a model's training step.

    Attributes:
        per_token: FLOPs per token, without attention scores and head.
        per_trained_token: FLOPs of the head per trained token.
        per_pair: FLOPs of a query with one key, summed over the layers with the same (window, chunk).
    """

    per_token: float
    per_trained_token: float
    per_pair: Mapping[tuple[int | None, int | None], float]

    def step(self, document_lengths: Iterable[int], trained_tokens: int) -> float:
        """Returns the FLOPs of a forward and backward pass over documents of these lengths in tokens."""
        tokens, flops = 0, self.per_trained_token * trained_tokens
        for length in document_lengths:
            tokens += length
            flops += sum(each * _pairs(length, *limits) for limits, each in self.per_pair.items())
        return self.per_token * tokens + flops


def _pairs(length: int, window: int | None, chunk: int | None) -> float:
    """Returns the number of pairs of a query and a key that it sees in a document."""
    if chunk is not None and length > chunk:
        return length // chunk * _pairs(chunk, None, None) + _pairs(length % chunk, None, None)
    if window is None or length <= window:
        return length * length / 2
    return window * (length - window / 2)


def model_flops(model: PreTrainedModel) -> ModelFlops:
    """Returns the FLOPs of a causal language model, from its parameters and its config.

    Raises:
        UnknownShape: The config does not say what some layers compute.
    """
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    elsewhere = {id(p) for layer in (embedding, head) if layer is not None for p in layer.parameters()}
    parameters = [(name, p) for name, p in model.named_parameters() if id(p) not in elsewhere]
    has_experts = any(".experts." in name for name, _ in parameters)
    active = _active_share(config) if has_experts else 1.0
    per_token = sum(_cost(p) * (active if ".experts." in name else 1.0) for name, p in parameters)
    in_head = 0.0 if head is None else sum(_cost(parameter) for parameter in head.parameters())
    per_pair: Counter = Counter()
    for layer in attention_shapes(config):
        per_pair[layer.window, layer.chunk] += 6.0 * (layer.query + layer.value)
    return ModelFlops(per_token, in_head, per_pair)


def _active_share(config: PretrainedConfig) -> float:
    """Returns the share of a mixture's experts that a token passes through."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((value for name in names if (value := getattr(config, name, None))), None)
    active = getattr(config, "num_experts_per_tok", None)
    if not experts or not active:
        raise UnknownShape("how many of its experts a token passes through is not in its config")
    return active / experts


def _cost(parameter: nn.Parameter) -> float:
    size = getattr(parameter, "ds_numel", parameter.numel())
    return (6.0 if parameter.requires_grad else 4.0) * size
