"""Finds the layers through which the documents of a packed sequence affect each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from snaketune.models.isolation import BOUND, Row, logits_of, main_output
from snaketune.models.twin import layer_list


@torch.no_grad()
def leaking_layers(model: PreTrainedModel, row: Row) -> list[str]:
    """Returns the layers through which the first document changes the others: "MambaMixer in layers 0-3 and 5".

    Each layer is tested by itself: it gets the other documents' inputs from before the change.
    """
    layers = layer_list(model)
    if layers is None:
        return []
    stop = row.boundaries[1]
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def record(layer, args, kwargs, output):
        inputs.append(_hidden(args, kwargs).clone())
        outputs.append(main_output(output).clone())

    _run_with_hooks(model, row, layers, after=record)
    moved = []

    def restore(layer, args, kwargs):
        hidden, before = _hidden(args, kwargs), inputs[len(moved)]
        hidden = torch.cat([hidden[:, :stop], before[:, stop:]], dim=1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def compare(layer, args, kwargs, output):
        before = outputs[len(moved)]
        change = (main_output(output) - before)[:, stop:].abs().max() / before.std()
        moved.append(change.item() > BOUND)

    _run_with_hooks(model, row.with_other_document(0), layers, before=restore, after=compare)
    mixers = [_mixer(layer) for layer in layers]
    leaking = [(mixers[number], number) for number, each in enumerate(moved) if each]
    return [
        f"{name} in {_layer_numbers([number for each, number in leaking if each == name])}"
        for name in dict.fromkeys(name for name, _ in leaking)
    ]


def _run_with_hooks(
    model: PreTrainedModel,
    row: Row,
    layers: Sequence[torch.nn.Module],
    before: Callable | None = None,
    after: Callable | None = None,
) -> None:
    handles = []
    for layer in layers:
        if before:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        if after:
            handles.append(layer.register_forward_hook(after, with_kwargs=True))
    try:
        logits_of(model, row)
    finally:
        for handle in handles:
            handle.remove()


def _hidden(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _mixer(layer: torch.nn.Module) -> str:
    """Returns the classes of a layer's parts in which tokens can see each other."""
    aside = re.compile(
        r"(MLP|Norm|Dropout|SparseMoeBlock|MoE|Moe|Experts|Linear|Identity|FeedForward|Gate|Router|Activation)$"
    )
    names = [type(each).__name__ for each in layer.children()]
    return (
        " and ".join(dict.fromkeys(name for name in names if not aside.search(name))) or type(layer).__name__
    )


def _layer_numbers(numbers: Sequence[int]) -> str:
    return ("layer " if len(numbers) == 1 else "layers ") + ", ".join(map(str, numbers))
