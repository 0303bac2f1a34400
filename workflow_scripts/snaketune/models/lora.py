"""LoRA: trains two small matrices for each frozen linear layer, and the full rows of new tokens.

Low-rank adaptation is Hu et al. 2021 (arXiv 2106.09685); the layers come from the `peft` package. Linear layers alone
cannot learn a chat format with tokens that are new to the base model. So the rows of these tokens, in the embedding and
in the head, are trained too (peft's `trainable_token_indices`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from snaketune.common.cli import UserError
from snaketune.models.expert_load import is_experts

ADAPTER = "default"  # peft's name for the only adapter


def add_lora(model: PreTrainedModel, lora: Mapping[str, Any], new_ids: Sequence[int]):
    """Freezes a model and adds the trained parts in place; its class and `forward` stay the same.

    Args:
        model: Already grown for its tokenizer.
        lora: `rank`, `alpha` (the update is scaled by alpha / rank), `dropout`, `target_modules`: `auto` for all
            linear layers except the head, or suffixes of their names, and `experts`: True adapts the experts of a
            mixture, which are not linear layers but parameters of three dimensions, False does not, None leaves it to
            peft.
        new_ids: Tokens whose rows are trained.

    Returns:
        peft's `LoraModel` around the model, for merging.

    Raises:
        UserError: The settings do not fit the model, or it was loaded in shards.
    """
    from peft.tuners.lora import LoraLayer, LoraModel

    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            "LoRA cannot be added to a model that was loaded in shards",
            found="zero3_init: true",
            fix="set zero3_init: false; zero_stage: 3 shards the model once it is loaded",
        )
    settings = lora_config(model, lora, new_ids)
    try:
        tuner = LoraModel(model, settings, ADAPTER)
    except ValueError as error:
        raise UserError(
            "LoRA does not fit the model",
            found=str(error).splitlines()[0][:300],
            expected="target_modules: auto, or names of linear layers such as q_proj; no dropout on experts",
            fix="change train.lora",
        ) from None
    adapted = any(
        isinstance(layer, LoraLayer) and is_experts(layer.get_base_layer()) for layer in model.modules()
    )
    if adapted and lora.get("experts") is False:
        raise UserError(
            "train.lora.experts is false, but target_modules names the experts",
            found=", ".join(lora["target_modules"]),
            expected="names of other layers",
            fix="remove the names of the experts' projections, or train.lora.experts",
        )
    return tuner


def adapted_layers(model: nn.Module) -> dict[str, int]:
    """Returns the number of adapted weights by name, with * in place of the numbers of layers."""
    from peft.tuners.lora import LoraLayer

    return _by_pattern(name for name, layer in model.named_modules() if isinstance(layer, LoraLayer))


def frozen_layers(model: nn.Module) -> dict[str, int]:
    """Returns the number of matrices that LoRA neither adapts nor trains, by name, as `adapted_layers` does.

    Norms and biases, which are always frozen, are not among them.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer | TrainableTokensLayer)]
    adapted = {id(_adapted_weight(layer)) for layer in layers}
    return _by_pattern(
        name.removesuffix(".weight")
        for name, weight in model.named_parameters()
        if not weight.requires_grad and weight.dim() > 1 and id(weight) not in adapted
    )


def describe_lora(model: nn.Module) -> str:
    """Returns what a run says about the layers that LoRA adapts, and those that stay as they are."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    names = [name for name, layer in model.named_modules() if isinstance(layer, TrainableTokensLayer)]
    rows = f"; trains the rows of new tokens in {', '.join(_by_pattern(names))}" if names else ""
    trained, every = trained_share(model)
    lines = [f"LoRA trains {trained:,} of {every:,} parameters{rows}"]
    for word, layers in (("adapted", adapted_layers(model)), ("frozen", frozen_layers(model))):
        listed = ", ".join(f"{name} ({count})" for name, count in layers.items())
        lines.append(f"  {word}: {listed or 'no matrix'}")
    return "\n".join([*lines, "  frozen too: all norms and biases"])


def adapted_in(names: Iterable[str]) -> dict[str, int]:
    """Returns what `adapted_layers` returns, from the names of a checkpoint's tensors."""
    return _by_pattern(name.partition(".lora_A.")[0] for name in names if ".lora_A." in name)


def _by_pattern(names: Iterable[str]) -> dict[str, int]:
    """Counts names. peft nests layers that adapt several parameters of one module: x, x.base_layer."""
    plain = (re.sub(r"\.(base_layer|token_adapter)\b", "", name) for name in names)
    return dict(Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in plain))


def _adapted_weight(layer) -> nn.Parameter:
    return layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight


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

    targets, experts = lora.get("target_modules", "auto"), _experts(model, lora)
    if targets == "auto":
        targets = "all-linear" if lora.get("experts") is not False else _linear_layers(model)
    rows = {name: sorted(new_ids) for name in _token_layers(model)} if new_ids else None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora.get("dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else list(targets),
        **experts,
        trainable_token_indices=rows,
        base_model_name_or_path=model.config._name_or_path or None,
    )


def _experts(model: PreTrainedModel, lora: Mapping[str, Any]) -> dict[str, Any]:
    """Returns peft's settings for the experts. Gate and up projection in one get twice the rank, as peft itself does."""
    if not lora.get("experts"):
        return {}
    names = {
        f"{name.rpartition('.')[2]}.{parameter}"
        for name, module in model.named_modules()
        if is_experts(module)
        for parameter, value in module.named_parameters(recurse=False)
        if value.dim() == 3
    }
    if not names:
        raise UserError(
            "train.lora.experts is true, but the model has no layers of experts that LoRA can adapt",
            found=type(model).__name__,
            expected="a mixture of experts",
            fix="remove train.lora.experts",
        )
    fused = r".*\.gate_up_proj"
    return {
        "target_parameters": sorted(names),
        "rank_pattern": {fused: 2 * lora["rank"]},
        "alpha_pattern": {fused: 2 * lora["alpha"]},
    }


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Returns the names of all linear layers except the head, and except those that peft would take for experts.

    peft translates names that were experts' projections in transformers 4, such as `gate_proj`, to the parameters of
    the experts, even where a linear layer has the name.
    """
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN as KINDS
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING as TRANSLATED

    taken = TRANSLATED.get(KINDS.get(model.config.model_type), {})
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and name.rpartition(".")[2] not in taken
    ]


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
