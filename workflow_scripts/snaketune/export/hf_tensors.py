"""Decides which tensors go into a Hugging Face folder, from the base model's architecture and the trained weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch

from snaketune.checkpoints.stored_tensors import LoadedTensor, StoredTensor
from snaketune.common.cli import UserError
from snaketune.export.lora_merge import MergedTensor
from snaketune.export.weight_shards import Output
from snaketune.models.base_model import weights_kept_in_float32
from snaketune.settings.schema import default_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def empty_model(
    base: str, trust_remote_code: bool = default_of("model.trust_remote_code")
) -> PreTrainedModel:
    """Returns a model of the base's architecture on the meta device, without memory for weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def plan_outputs(
    model: PreTrainedModel,
    state: Mapping[str, StoredTensor | LoadedTensor | MergedTensor],
    dtype: str,
    base: str,
    rows: int | None = None,
) -> dict[str, Output]:
    """Returns the tensors to write, by their names in the model; tied ones once.

    Args:
        model: From `empty_model`; its vocabulary is resized to that of the weights, or to `rows`.
        state: All weights; a tied head may be missing.
        dtype: Type of the parameters; buffers keep theirs, and what transformers keeps in float32 is written so.
        base: Name of the base model, for messages.
        rows: Vocabulary rows to keep; None keeps all.

    Raises:
        UserError: Names or shapes do not match the architecture.
    """
    embedding = next(name for name, value in model.named_parameters() if value is _input_weight(model))
    if embedding not in state:
        raise _mismatch(base, f"no {embedding}", "weights of this architecture")
    _resize(model, state[embedding].shape[0])
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    for name, tensor in state.items():
        if wanted.get(name) != tensor.shape:
            raise _mismatch(base, f"{name} {tuple(tensor.shape)}", f"{tuple(wanted.get(name, ()))}")
    if rows is not None:
        if rows > state[embedding].shape[0]:
            raise _mismatch(base, f"{state[embedding].shape[0]} rows", f"at least {rows}, one for each token")
        _resize(model, rows)
    parameters = dict(model.named_parameters())
    absent = sorted(parameters.keys() - state.keys())
    if absent:
        raise _mismatch(base, f"no weights for {', '.join(absent[:5])}", "weights of all parameters")
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    in_float32 = set(weights_kept_in_float32(model))
    outputs = {}
    for name, value in model.state_dict().items():
        if name in state and name not in tied:
            stored = state[name]
            kept = value.shape[0] if value.shape != stored.shape else None
            written = getattr(torch, dtype) if name in parameters else stored.dtype
            outputs[name] = Output(stored, torch.float32 if name in in_float32 else written, kept)
    return outputs


def as_published(
    model: PreTrainedModel, outputs: dict[str, Output], base: Collection[str] = ()
) -> dict[str, Output]:
    """Converts outputs from transformers' internal names and shapes to those of published checkpoints.

    Shapes differ for mixtures of experts only: transformers keeps all experts of a layer in one tensor. Such models are
    read into memory.

    Args:
        model: The tuned model's class.
        outputs: Outputs by their names in the model.
        base: Names in the base model's files. transformers reads some tensors under several names (the layers of a
            vision tower), and these tell which was published.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.core_model_loading import revert_weight_conversion as revert

    changes = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(change, WeightConverter) for change in changes):
        published = revert(model, {name: each.load() for name, each in outputs.items()})
        outputs = {name: Output(LoadedTensor(tensor), tensor.dtype) for name, tensor in published.items()}
    elif changes:
        numbers = revert(model, {name: torch.tensor(number) for number, name in enumerate(outputs)})
        in_order = list(outputs.values())
        outputs = {name: in_order[int(number)] for name, number in numbers.items()}
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    inside = model.state_dict()

    def in_memory(name: str) -> str:
        return rename_source_key(name, renamings, [], model.base_model_prefix, inside)[0]

    other = {in_memory(name): name for name in base} if not outputs.keys() <= set(base) else {}
    return {
        name if name in base else other.get(in_memory(name), name): each for name, each in outputs.items()
    }


def _resize(model: PreTrainedModel, rows: int) -> None:
    if rows != _input_weight(model).shape[0]:
        with torch.device("meta"):
            model.resize_token_embeddings(rows, mean_resizing=False)
    model.tie_weights()


def _input_weight(model: PreTrainedModel):
    return model.get_input_embeddings().weight


def _mismatch(base: str, found: str, expected: str) -> UserError:
    return UserError(
        f"the checkpoint does not belong to the base model {base}",
        found=found,
        expected=expected,
        fix="pass the config that the checkpoint was trained with",
    )
