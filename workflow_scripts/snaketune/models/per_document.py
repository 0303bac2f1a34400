"""Runs parts of a model on each document of a packed sequence by itself.

For layers that carry state from token to token, such as recurrent ones and convolutions, which do not end at a document.
A document by itself starts from an empty state, so this is exact with any kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import nn

from snaketune.models.documents import current_boundaries, with_boundaries
from snaketune.models.packed_attention import PACKING_ARGUMENTS


def run_per_document(model: nn.Module, kinds: Collection[type[nn.Module]]) -> None:
    """Makes the modules of some classes run document by document while the model runs on a packed sequence.

    Changes nothing for any other input. The model needs `note_documents`.
    """
    done: list[str] = []
    for name, module in model.named_modules():
        if type(module) in kinds and not any(name.startswith(f"{outer}.") for outer in done):
            # A bound method, so that a copy of the module gets one of its own.
            module.forward = MethodType(_forward, module)
            done.append(name)


def run_per_document_kinds(model: nn.Module) -> list[type[nn.Module]]:
    """Returns the classes of the modules that run document by document."""
    modules = [each for each in model.modules() if getattr(each.forward, "__func__", None) is _forward]
    return list(dict.fromkeys(type(each) for each in modules))


def _forward(module: nn.Module, *args, **kwargs) -> Any:
    boundaries = current_boundaries()
    if boundaries is None:
        return type(module).forward(module, *args, **kwargs)
    return call_per_document(lambda *a, **k: type(module).forward(module, *a, **k), boundaries, args, kwargs)


def call_per_document(call: Callable, boundaries: Sequence[int], args: tuple, kwargs: dict) -> Any:
    """Calls a part of a model with each document's stretch of its arguments, and joins what it returns.

    Args:
        call: The part. Its first tensor is (1, tokens, width).
        boundaries: Boundaries of the documents, [0, ..., tokens].
        args: Arguments for the packed sequence. Tensors are cut in the dimension that has its length, masks in two.
        kwargs: The same, by name; those that describe packed documents are left out.

    Returns:
        What `call` returns. Tensors without a dimension of the documents' lengths, such as states, become None.

    Raises:
        ValueError: The first tensor has another shape.
    """
    tokens = boundaries[-1]
    kwargs = {name: value for name, value in kwargs.items() if name not in PACKING_ARGUMENTS}
    hidden = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
    if hidden is None or hidden.dim() < 3 or hidden.shape[:2] != (1, tokens):
        raise ValueError(
            f"a layer that runs document by document got {None if hidden is None else tuple(hidden.shape)} instead of "
            f"(1, {tokens}, width)"
        )
    outputs = []
    with with_boundaries(None):
        for start, stop in pairwise(boundaries):
            own_args, own_kwargs = _cut((args, kwargs), start, stop, tokens)
            outputs.append(call(*own_args, **own_kwargs))
    return _join(outputs, [stop - start for start, stop in pairwise(boundaries)])


def _cut(value: Any, start: int, stop: int, tokens: int) -> Any:
    if isinstance(value, torch.Tensor):
        for dimension in _token_dimensions(value, tokens):
            value = value.narrow(dimension, start, stop - start)
        return value
    if type(value) in (tuple, list):
        return type(value)(_cut(each, start, stop, tokens) for each in value)
    if type(value) is dict:
        return {name: _cut(each, start, stop, tokens) for name, each in value.items()}
    return value


def _token_dimensions(value: torch.Tensor, tokens: int) -> list[int]:
    """Returns the dimensions that run over the tokens of the packed sequence. A width may be equal to their number."""
    if value.dim() >= 4 and value.shape[-2:] == (tokens, tokens):
        return [value.dim() - 2, value.dim() - 1]  # a mask
    order = sorted(range(value.dim()), key=lambda dimension: dimension != 1 or value.dim() < 3)
    return [dimension for dimension in order if value.shape[dimension] == tokens][:1]


def _join(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        whole = all(
            each.dim() > 1 and each.shape[1] == size for each, size in zip(outputs, sizes, strict=True)
        )
        return torch.cat(list(outputs), dim=1) if whole else None
    if type(first) in (tuple, list):
        return type(first)(_join(each, sizes) for each in zip(*outputs, strict=True))
    return first
