"""The weights of a LoRA run: its checkpoint merged into the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import cached_file

from snaketune.checkpoints.safetensors_files import open_safetensors, safetensors_files
from snaketune.checkpoints.stored_tensors import LoadedTensor, StoredTensor, StoredTensors
from snaketune.export.hf_tensors import empty_model
from snaketune.export.lora_merge import MergedTensor, merge_lora, own_tensors
from snaketune.models.base_model import grow_to_tokenizer, load_base_model
from snaketune.models.device import attention_on, training_device
from snaketune.settings.schema import default_of
from snaketune.training.train_config import TrainConfig


def merged_weights(
    config: TrainConfig,
    state: StoredTensors,
    dtype: str,
    trust_remote_code: bool = default_of("model.trust_remote_code"),
    adapter: Path | None = None,
) -> dict[str, StoredTensor | MergedTensor] | dict[str, LoadedTensor]:
    """Returns all weights of a LoRA run, without reading them.

    Merges in memory only if a trained layer is not linear, or the base model's files hold different tensors than
    transformers has in memory (mixtures of experts, layers that stay in fp32, no safetensors).

    Args:
        config: The training config.
        state: The checkpoint's tensors.
        dtype: The training dtype.
        trust_remote_code: Runs Python code that comes with the base model.
        adapter: Folder to create for the trained parameters, in `peft`'s format.
    """
    base = config.model_path
    model = empty_model(base, trust_remote_code)
    model.tie_weights()
    stored = open_base(base)
    if not _is_as_in_memory(stored, model):
        stored = None
    new_ids, before = grow_to_tokenizer(model, config.tokenizer_path, base)
    if adapter is not None:
        adapter.mkdir()
    return merge_lora(
        *(model, stored, config.lora, new_ids, before),
        *(state, getattr(torch, dtype)),
        load=lambda: grown_base(config, dtype, trust_remote_code)[0],
        adapter_folder=adapter,
    )


def grown_base(
    config: TrainConfig, dtype: str, trust_remote_code: bool = default_of("model.trust_remote_code")
) -> tuple[Any, list[int]]:
    """Returns the base model as at the start of training, and the ids of the tokens that are new to it."""
    attention = attention_on(training_device(), config.attention)
    model = load_base_model(config.model_path, dtype, attention, trust_remote_code)
    return model, grow_to_tokenizer(model, config.tokenizer_path, config.model_path)[0]


def open_base(base: str) -> dict[str, StoredTensor]:
    """Returns the tensors of a base model's safetensors, unread; {} if it has none.

    Args:
        base: A folder, or the name of a model in the hub's cache.
    """
    folder = Path(base) if Path(base).is_dir() else Path(cached_file(base, "config.json")).parent
    return open_safetensors(folder).stored if safetensors_files(folder) else {}


def _is_as_in_memory(stored: dict[str, StoredTensor], model: PreTrainedModel) -> bool:
    """True if the files hold the same tensors as transformers in memory. (8-bit floats keep their scales elsewhere.)"""
    return (
        all(
            name in stored and stored[name].shape == value.shape and "float8" not in str(stored[name].dtype)
            for name, value in own_tensors(model).items()
        )
        and not get_model_conversion_mapping(model, add_legacy=False)
        and not getattr(model, "_keep_in_fp32_modules", None)
        and not getattr(model, "_keep_in_fp32_modules_strict", None)
    )
