"""Merges LoRA's trained parameters into the base model's weights, a block of rows at a time.

The result equals peft's `merge_and_unload` on the model in fp32, bit for bit: W + (B A) x scaling, with the rows of new
tokens inserted. Neither the base model nor any of its tensors has to fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from snaketune.checkpoints.stored_tensors import (
    CHUNK,
    Extent,
    LoadedTensor,
    StoredTensor,
    StoredTensors,
    read_whole,
)
from snaketune.common.cli import UserError
from snaketune.models.lora import ADAPTER, add_lora

_BLOCK = 4 * CHUNK  # elements merged at a time
_MEAN_BLOCK = 64 * CHUNK  # elements of the columns averaged at a time
_COLUMNS = 32  # torch sums columns in groups of this size; other groups change the last bits


@dataclass(frozen=True)
class LowRank:
    """The update (B A) x `scaling`; `transposed` if the layer stores its weight as (in, out)."""

    a: StoredTensor
    b: StoredTensor
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class MergedTensor:
    """A weight of the tuned model in fp32, with the interface of a `StoredTensor`.

    Args:
        base: The base model's weight.
        shape: Shape including the rows added for the tokenizer.
        trained_in: Type that the base model was loaded in for training.
        before: The rows whose mean initialised the added ones.
        low_rank: The update that LoRA adds.
        ids: Tokens whose rows were trained.
        rows: The trained rows.
    """

    base: StoredTensor
    shape: torch.Size
    trained_in: torch.dtype
    before: Sequence[int] = ()
    low_rank: LowRank | None = None
    ids: Sequence[int] = ()
    rows: StoredTensor | None = None

    dtype = torch.float32

    @property
    def extents(self) -> tuple[Extent, ...]:
        """All extents that this tensor is computed from."""
        read = [self.base, self.rows, *((self.low_rank.a, self.low_rank.b) if self.low_rank else ())]
        return tuple(extent for each in read if each for extent in each.extents)

    @property
    def recipe(self) -> str:
        """How the extents are merged, to detect whether a killed conversion did the same."""
        scaling = self.low_rank.scaling if self.low_rank else None
        return f"{self.trained_in} {scaling} {list(self.before)} {list(self.ids)}"

    def chunks(self, rows: int | None = None) -> Iterator[torch.Tensor]:
        """See `StoredTensor.chunks`."""
        count = rows if rows is not None else _height(self.shape)
        mean = self._mean() if count > _height(self.base.shape) else None
        if self.low_rank is not None:
            a, b = (read_whole(part, torch.float32) for part in (self.low_rank.a, self.low_rank.b))
        trained = read_whole(self.rows, torch.float32) if self.rows is not None else None
        # Blocks of about equal size: a matrix of very few rows would be multiplied in a different order.
        blocks = max(1, math.ceil(count * self.shape[1:].numel() / _BLOCK))
        edges = [count * i // blocks for i in range(blocks + 1)]
        for first, last in zip(edges, edges[1:], strict=False):
            block = self._base_rows(first, last, mean)
            if self.low_rank is not None:
                delta = (b @ a[:, first:last]).T if self.low_rank.transposed else b[first:last] @ a
                block += delta.mul_(self.low_rank.scaling)
            for place, i in enumerate(self.ids):
                if first <= i < last:
                    block[i - first] = trained[place]
            yield from block.view(-1).split(CHUNK)

    def _base_rows(self, first: int, last: int, mean: torch.Tensor | None = None) -> torch.Tensor:
        """Returns rows of the grown base in fp32, rounded as in training: (last - first, elements of a row)."""
        block = torch.empty(last - first, self.shape[1:].numel())
        here = max(0, min(last, _height(self.base.shape)) - first)
        at = 0
        source = self.base.part(first, here) if self.base.shape else self.base
        for chunk in source.chunks():
            block.view(-1)[at : at + chunk.numel()] = chunk.to(self.trained_in)
            at += chunk.numel()
        if here < len(block):
            block[here:] = mean
        return block

    def _mean(self) -> torch.Tensor:
        """Returns the mean of the rows `before` as `resize_for_tokenizer` computes it, some columns at a time."""
        before, width = torch.tensor(self.before), self.shape[1:].numel()
        columns = max(1, _MEAN_BLOCK // len(before) // _COLUMNS) * _COLUMNS
        step = max(1, _BLOCK // width)
        means = []
        for left in range(0, width, columns):
            part, at = torch.empty(len(before), min(columns, width - left)), 0
            for first in range(0, _height(self.base.shape), step):
                last = min(first + step, _height(self.base.shape))
                taken = before[(first <= before) & (before < last)] - first
                part[at : at + len(taken)] = self._base_rows(first, last)[taken, left : left + columns]
                at += len(taken)
            means.append(part.mean(dim=0))
        return torch.cat(means).to(self.trained_in).float()


def merge_lora(
    model: PreTrainedModel,
    base: Mapping[str, StoredTensor] | None,
    lora: Mapping[str, Any],
    new_ids: Sequence[int],
    before: Sequence[int],
    state: StoredTensors,
    trained_in: torch.dtype,
    load: Callable[[], PreTrainedModel],
    adapter_folder: Path | None = None,
) -> dict[str, StoredTensor | MergedTensor] | dict[str, LoadedTensor]:
    """Returns all weights of the tuned model, tied ones once; unread if `base` is given and all layers are linear.

    Args:
        model: A model of the base's architecture, grown for its tokenizer, on the meta device; changed in place.
        base: The base model's weights by their names in the model; None if the files use other names.
        lora: The LoRA settings of the training.
        new_ids: Tokens whose rows were trained.
        before: The rows whose mean initialised added ones, see `resize_for_tokenizer`.
        state: The checkpoint's tensors by their names in the trained model.
        trained_in: Type that the base model was loaded in for training.
        load: Returns the grown base model in memory, for merging by peft.
        adapter_folder: An existing folder that also gets the trained parameters in peft's format.

    Raises:
        UserError: The checkpoint's tensors do not match these settings.
    """
    values = own_tensors(model)
    tuner = add_lora(model, lora, new_ids)
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    missing, more = sorted(wanted - state.keys()), sorted(state.keys() - set(model.state_dict()))
    if missing or more:
        raise UserError(
            "the checkpoint does not belong to these LoRA settings",
            found=f"no {missing[0]}" if missing else f"also {more[0]}",
            expected=f"{len(wanted)} trained tensors",
            fix="pass the config that the checkpoint was trained with",
        )
    if adapter_folder is not None:
        _write_adapter(tuner, {name: state[name] for name in wanted}, adapter_folder)
    parts = _trained_parts(model, state)
    if base is None or not parts.keys() <= values.keys():
        loaded = load().float()
        tuner = add_lora(loaded, lora, new_ids)
        loaded.load_state_dict(dict(state), strict=False)
        return {name: LoadedTensor(value) for name, value in own_tensors(tuner.merge_and_unload()).items()}
    merged: dict[str, StoredTensor | MergedTensor] = {}
    for name, value in values.items():
        if name in state:  # a buffer
            merged[name] = state.stored[name]
        elif not value.is_floating_point():
            merged[name] = base[name]
        else:
            grown = before if value.shape != base[name].shape else ()
            merged[name] = MergedTensor(base[name], value.shape, trained_in, grown, **parts.get(name, {}))
    return merged


def own_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns a model's parameters and saved buffers by name, tied ones once."""
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    return {name: value for name, value in model.state_dict().items() if name not in tied}


def _trained_parts(model: PreTrainedModel, state: StoredTensors) -> dict[str | None, dict[str, Any]]:
    """Returns the trained parts by weight name in the base model; the key None marks a layer that is not linear."""
    from peft.tuners.lora import Linear, LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    parts: dict[str | None, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if type(layer) is Linear:
            a, b = (state.stored[f"{name}.lora_{each}.{ADAPTER}.weight"] for each in "AB")
            low_rank = LowRank(a, b, layer.scaling[ADAPTER], layer.fan_in_fan_out)
            parts[f"{name}.weight"] = {"low_rank": low_rank}
        elif isinstance(layer, LoraLayer):
            parts[None] = {}
        elif isinstance(layer, TrainableTokensLayer) and layer.tied_adapter is None:
            rows = state.stored[f"{name}.trainable_tokens_delta.{ADAPTER}"]
            owner = f"{name.removesuffix('.token_adapter')}.weight"
            parts.setdefault(owner, {}).update(ids=layer.token_indices[ADAPTER], rows=rows)
    return parts


def _height(shape: torch.Size) -> int:
    return shape[0] if shape else 1


def _write_adapter(tuner, trained: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, with the names that `PeftModel` expects."""
    from safetensors.torch import save_file

    settings = tuner.peft_config[ADAPTER]
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    names = {name: "base_model.model." + name.replace(f".{ADAPTER}", "") for name in trained}
    tensors = {names[name]: value.float().contiguous() for name, value in trained.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
