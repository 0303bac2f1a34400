"""LoRA: two small trained matrices beside each frozen linear layer, and the rows of new tokens trained whole.

Low-rank adaptation is Hu et al. 2021 (arXiv 2106.09685); the layers are those of the `peft` package. A chat format with
tokens that the base model does not know cannot be learnt by the linear layers alone, so the rows of these tokens, in
the embedding and in the head, are trained too (`trainable_token_indices` of peft).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from snaketune.common.cli import UserError

ADAPTER = "default"  # peft's name for the one that there is


def add_lora(model: PreTrainedModel, lora: Mapping[str, Any], new_ids: Sequence[int]):
    """Freezes a model and puts the trained parts into it, in place: its class and its forward stay.

    Args:
        model: Already grown for its tokenizer.
        lora: `rank`, `alpha` (the update is scaled by alpha / rank), `dropout`, and `target_modules`: `auto` for all
            linear layers but the head, or the ends of their names.
        new_ids: Tokens whose rows are trained.

    Returns:
        peft's `LoraModel` around it, which merges.

    Raises:
        UserError: The settings do not fit the model, or it was loaded in shards.
    """
    from peft.tuners.lora import LoraModel

    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            "LoRA cannot be put into a model that was loaded in shards",
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
    """Tells ZeRO-3 which weights peft's layer of token rows reads past the modules that own them, before it shards."""
    from deepspeed.runtime.zero import register_external_parameter
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            for parameter in (layer.base_layer.weight, *layer.trainable_tokens_delta.values()):
                register_external_parameter(layer, parameter)


def leave_out_frozen(model: nn.Module) -> None:
    """Makes `model.state_dict()` hold trained parameters and buffers alone: what is frozen is the base model's.

    DeepSpeed can leave frozen parameters out of a checkpoint by itself, but not the second name of tied ones.
    """
    frozen = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]

    def drop(module, state, prefix, metadata) -> None:
        for name in frozen:
            state.pop(prefix + name, None)

    model.register_state_dict_post_hook(drop)


def lora_config(model: PreTrainedModel, lora: Mapping[str, Any], new_ids: Sequence[int]):
    """Returns peft's configuration, see `add_lora`."""
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
    """Names of the layers that hold rows of tokens; peft ties a tied head to the embedding by itself."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    layers = (embedding,) if tied else (embedding, head)
    if any(getattr(layer, "bias", None) is not None for layer in layers):
        raise UserError(
            "LoRA cannot train the rows of new tokens of this model",
            found="a head with a bias",
            expected="a head without one",
            fix="train all parameters: set train.lora to null",
        )
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def trained_share(model: nn.Module) -> tuple[int, int]:
    """Returns (trained parameters, all parameters)."""
    sizes = [(_size(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
