"""Counts how many tokens each expert of a mixture of experts gets."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

# The argument of the experts' forward pass with the experts that each token goes to, in all families of transformers.
_CHOICES = ("top_k_index", "router_indices", "selected_experts")


class ExpertLoad:
    """Counts the tokens that the router sends to each expert, layer by layer, by hooks on the layers of experts.

    It counts the router's choice itself, so it does not depend on how a family computes it.

    Args:
        model: A causal language model. One without experts, or whose experts do not get the router's choice as an
            argument (Llama 4), has no `layers`.

    Attributes:
        layers: Names of the layers of experts.
    """

    def __init__(self, model: nn.Module):
        self._counting = False
        self._counts: list[torch.Tensor | None] = []
        self._experts: list[int] = []
        self.layers: list[str] = []
        for name, module in model.named_modules():
            place = _place_of_choice(module)
            if place is not None:
                module.register_forward_pre_hook(self._hook(len(self.layers), *place), with_kwargs=True)
                self.layers.append(name)
                self._counts.append(None)
                self._experts.append(expert_count(module))

    @contextmanager
    def count(self) -> Iterator[None]:
        """Counts forward passes within the block. Those that recompute activations run outside it, and do not count."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def take(self, device: torch.device) -> torch.Tensor:
        """Returns the tokens of each expert since the last call, layer after layer: float64 (sum of experts,)."""
        counts = [
            torch.zeros(experts, device=device) if count is None else count[:experts]
            for count, experts in zip(self._counts, self._experts, strict=True)
        ]
        self._counts = [None] * len(counts)
        return torch.cat(counts).double()

    def describe(self, counts: torch.Tensor) -> list[tuple[float, float, float]]:
        """Returns (least, most, entropy) of each layer, from the sum of `take` over the ranks.

        `least` and `most` are the shares of the experts with the fewest and the most tokens, in units of an even share:
        1 is even, 0 is unused. `entropy` is that of the shares divided by that of even ones: 1 is even, 0 is one expert.
        """
        return [_describe(layer) for layer in counts.cpu().split(self._experts)]

    def _hook(self, layer: int, position: int, name: str):
        def hook(module, args, kwargs) -> None:
            if not self._counting:
                return
            chosen = (args[position] if len(args) > position else kwargs[name]).detach().flatten()
            experts = self._experts[layer]
            if self._counts[layer] is None:
                self._counts[layer] = torch.zeros(experts + 1, device=chosen.device)
            # Tokens without an expert have the number after the last.
            chosen = chosen.long().clamp(max=experts)
            self._counts[layer].scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float32))

        return hook


def is_experts(module: nn.Module) -> bool:
    """True for a layer that keeps all its experts in parameters of three dimensions, the first of which is theirs."""
    own = module.parameters(recurse=False)
    return "Experts" in type(module).__name__ and any(len(_shape(parameter)) == 3 for parameter in own)


def expert_count(module: nn.Module) -> int:
    """Returns the number of experts of a layer for which `is_experts` is true."""
    return next(_shape(p)[0] for p in module.parameters(recurse=False) if len(_shape(p)) == 3)


def _shape(parameter: nn.Parameter) -> Sequence[int]:
    return getattr(parameter, "ds_shape", parameter.shape)


def _place_of_choice(module: nn.Module) -> tuple[int, str] | None:
    if not is_experts(module):
        return None
    names = list(inspect.signature(module.forward).parameters)
    return next(((names.index(name), name) for name in _CHOICES if name in names), None)


def _describe(counts: torch.Tensor) -> tuple[float, float, float]:
    total, experts = counts.sum().item(), len(counts)
    if not total or experts == 1:
        return 0.0, 0.0, 0.0
    shares = counts / total
    entropy = torch.special.entr(shares).sum().item() / math.log(experts)
    return shares.min().item() * experts, shares.max().item() * experts, entropy
