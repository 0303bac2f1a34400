"""LoRA: trains two small matrices for each frozen linear layer, and the full rows of new tokens.

Low-rank adaptation is Hu et al. 2021 (arXiv 2106.09685); the layers come from the `peft` package. Linear layers alone
cannot learn a chat format with tokens that are new to the base model. So the rows of these tokens, in the embedding and
in the head, are trained too (peft's `trainable_token_indices`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from snaketune.common.cli import UserError

ADAPTER = "default"  # peft's name for the only adapter


def add_lora(model: PreTrainedModel, lora: Mapping[str, Any], new_ids: Sequence[int]):
    """Freezes a model and adds the trained parts in place; its class and `forward` stay the same.

    Args:
        model: Already grown for its tokenizer.
        lora: `rank`, `alpha` (the update is scaled by alpha / rank), `dropout`, and `target_modules`: `auto` for all
            linear layers except the head, or suffixes of their names.
        new_ids: Tokens whose rows are trained.

    Returns:
        peft's `LoraModel` around the model, for merging.

    Raises:
        UserError: The settings do not fit the model, or it was loaded in shards.
    """
    from peft.tuners.lora import LoraModel

    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            "LoRA cannot be added to a model that was loaded in shards",
            found="zero3_init: true",
            fix="set zero3_init: false; zero_stage: 3 shards the model once it is loaded",
        )
    settings = lora_config(model, lora, new_ids)
    try:
        return LoraModel(model, settings, ADAPTER)
    except ValueError as error:
        raise UserError(
            "LoRA does not fit the model",
            found=str(error).splitlines()[0][:300],
            expected="target_modules: auto, or names of linear layers such as q_proj",
        ) from None


def register_token_rows(model: nn.Module) -> None:
    """Tells ZeRO-3, before it shards, which weights peft's token-row layers read without calling their modules."""
    from deepspeed.runtime.zero import register_external_parameter
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            for parameter in (layer.base_layer.weight, *layer.trainable_tokens_delta.values()):
                register_external_parameter(layer, parameter)


def leave_out_frozen(model: nn.Module) -> None:
    """Drops frozen parameters, which the base model has, from `model.state_dict()`.

    DeepSpeed can leave frozen parameters out of a checkpoint, but not the second name of tied ones.
    """
    frozen = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]

    def drop(module, state, prefix, metadata) -> None:
        for name in frozen:
            state.pop(prefix + name, None)

    model.register_state_dict_post_hook(drop)


def lora_config(model: PreTrainedModel, lora: Mapping[str, Any], new_ids: Sequence[int]):
    """Returns peft's configuration; see `add_lora`."""
    from peft import LoraConfig

    targets = lora.get("target_modules", "auto")
    rows = {name: sorted(new_ids) for name in _token_layers(model)} if new_ids else None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora.get("dropout", 0.0),
        target_modules="all-linear" if targets == "auto" else list(targets),
        trainable_token_indices=rows,
        base_model_name_or_path=model.config._name_or_path or None,
    )


def _token_layers(model: PreTrainedModel) -> list[str]:
    """Returns the names of the layers with token rows. peft itself ties a tied head to the embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    layers = (embedding,) if tied else (embedding, head)
    if any(getattr(layer, "bias", None) is not None for layer in layers):
        raise UserError(
            "LoRA cannot train the rows of new tokens of this model",
            found="a head with a bias",
            expected="a head without a bias",
            fix="set train.lora to null to train all parameters",
        )
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def trained_share(model: nn.Module) -> tuple[int, int]:
    """Returns (trained parameters, all parameters)."""
    sizes = [(_size(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
