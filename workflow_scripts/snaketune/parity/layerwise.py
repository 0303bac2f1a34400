"""Runs a transformers model that is larger than memory: a layer's weights are in memory only while it runs.

Makes no assumption about an architecture but this: its layers are in `ModuleList`s, as in every model of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from snaketune.common.cli import UserError

Weights = Mapping[str, torch.Tensor]


def empty_with_buffers(config: Any, **options: Any) -> Any:
    """Returns a model of this config in eval mode, for fp32: parameters without memory, buffers computed.

    Args:
        config: A transformers config.
        options: Further arguments of `from_config`, such as `attn_implementation`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    model.tie_weights()  # the context makes a parameter of its own of each name
    _drop_memory(model)  # of parameters that the model has put in place in another way
    return model.eval()


def _drop_memory(model: nn.Module) -> None:
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                made = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                module._parameters[leaf] = empty.setdefault(id(parameter), made)


def load_as_it_runs(model: nn.Module, weights: Weights, rounded_to: torch.dtype | None = None) -> None:
    """Makes a model without memory for its parameters load each layer just before it runs, and drop it afterwards.

    Embeddings and the head are such units too. Everything else is small and stays in memory.

    Args:
        model: Parameters on the meta device; saved buffers are overwritten.
        weights: Tensors by their names in the model; of tied ones, one name is enough.
        rounded_to: Rounds every parameter to this dtype; None keeps them unchanged.

    Raises:
        UserError: Weights are missing, or have another shape. (That of a layer that never runs may.)
    """
    known = set(weights)
    _load_buffers(model, weights, known)
    empty = {name: each for name, each in model.named_parameters(remove_duplicate=False) if each.is_meta}
    names_of: dict[int, list[str]] = {}
    for name, parameter in empty.items():
        names_of.setdefault(id(parameter), []).append(name)
    loaded: list[tuple[nn.Module, str, nn.Parameter]] = []

    def load(name: str) -> None:
        source = next((each for each in (name, *names_of[id(empty[name])]) if each in known), None)
        tensor = None if source is None else weights[source]
        if tensor is None or tensor.shape != empty[name].shape:
            raise UserError(
                "the weights do not fit the architecture",
                found=f"no {name}" if tensor is None else f"{name} {tuple(tensor.shape)}",
                expected=f"{name} {tuple(empty[name].shape)}",
                fix="convert the checkpoint with the config that it was trained with",
            )
        tensor = (tensor if rounded_to is None else tensor.to(rounded_to)).float()
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        loaded.append((owner, leaf, empty[name]))
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def load_unit(names: list[str]) -> None:
        while loaded:
            owner, leaf, parameter = loaded.pop()
            owner._parameters[leaf] = parameter
        for name in names:
            load(name)

    left = dict.fromkeys(empty)
    for prefix, unit in _units(model, ""):
        names = [name for name in empty if name.startswith(f"{prefix}.")]
        for name in names:
            left.pop(name, None)

        def before(_: Any, __: Any, part: nn.Module, names: list[str] = names) -> None:
            if any(parameter.is_meta for parameter in part.parameters()):
                load_unit(names)

        # A model may also call the parts of a layer itself, or ask before all else where its embedding is.
        for part in unit.modules():
            part.register_forward_pre_hook(partial(before, part=part))
        if unit is model.get_input_embeddings():
            places = prefix.split(".")
            for end in range(len(places)):
                above = model.get_submodule(".".join(places[:end]))
                above.register_forward_pre_hook(partial(before, part=unit))
    load_unit(list(left))
    loaded.clear()


def _units(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules whose weights are loaded together, with their names."""
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{number}", each) for number, each in enumerate(child))
        elif isinstance(child, nn.Embedding) or child is head:
            yield path, child
        else:
            yield from _units(child, f"{path}.")


def _load_buffers(model: nn.Module, weights: Weights, known: set[str]) -> None:
    for name, buffer in model.named_buffers():
        if name in known:
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._buffers[leaf] = weights[name].to(buffer.dtype)
