"""The weights of a LoRA run: what its checkpoint holds, put into the base model that its training started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import cached_file

from common.files import read_json
from sft.config import TrainConfig
from sft.lora_merge import MergedTensor, merge_lora, own_tensors
from sft.model import load_base_model, resize_for_tokenizer, rows_before
from sft.stored_tensors import LoadedTensor, Piece, StoredTensor, StoredTensors
from sft.tokenizer_rows import find_new_tokens

from .hf_weights import empty_model
from .weight_shards import DTYPE_NAMES

_DTYPES = {name: getattr(torch, dtype) for dtype, name in DTYPE_NAMES.items()}


def merged_weights(
    config: TrainConfig,
    state: StoredTensors,
    dtype: str,
    trust_remote_code: bool = False,
    adapter: Path | None = None,
) -> dict[str, StoredTensor | MergedTensor] | dict[str, LoadedTensor]:
    """Returns all weights of a LoRA run, unread.

    Only where the base model's files hold other tensors than transformers has in memory (mixtures of experts, layers
    that stay in fp32, no safetensors), or a trained layer is not linear, they are merged in memory.

    Args:
        config: The training config.
        state: What the checkpoint holds.
        dtype: What the model was trained in.
        trust_remote_code: Runs Python code that comes with the base model.
        adapter: Folder to make for the trained parts, as `peft` reads them.
    """
    base, tokenizer = config.model_path, config.tokenizer_path
    model = empty_model(base, trust_remote_code)
    model.tie_weights()
    stored = open_stored(base)
    own = {name: value.shape for name, value in own_tensors(model).items()}
    as_in_memory = (
        all(name in stored and stored[name].shape == shape for name, shape in own.items())
        and not get_model_conversion_mapping(model, add_legacy=False)
        and not getattr(model, "_keep_in_fp32_modules", None)
        and not getattr(model, "_keep_in_fp32_modules_strict", None)
    )
    new_ids, before = [], []
    if tokenizer is not None:
        vocab_size, new_ids = find_new_tokens(tokenizer, base)
        before = rows_before(model.get_input_embeddings().weight.shape[0], vocab_size, new_ids)
        resize_for_tokenizer(model, vocab_size, new_ids)
    if adapter is not None:
        adapter.mkdir()
    return merge_lora(
        *(model, stored if as_in_memory else None, config.lora, new_ids, before),
        *(state, getattr(torch, dtype)),
        load=lambda: grown_base(config, dtype, trust_remote_code)[0],
        adapter_folder=adapter,
    )


def grown_base(config: TrainConfig, dtype: str, trust_remote_code: bool = False) -> tuple[Any, list[int]]:
    """Returns the base model as its training starts from it, and the ids of the tokens that are new to it."""
    base, tokenizer = config.model_path, config.tokenizer_path
    model = load_base_model(base, dtype, "sdpa", trust_remote_code)
    new_ids: list[int] = []
    if tokenizer is not None:
        vocab_size, new_ids = find_new_tokens(tokenizer, base)
        resize_for_tokenizer(model, vocab_size, new_ids)
    return model, new_ids


def open_stored(base: str) -> dict[str, StoredTensor]:
    """Returns the tensors of the safetensors that transformers reads of a base model, unread; {} where it has none.

    Args:
        base: A folder, or the name of a model in the hub's cache.
    """
    folder = Path(base) if Path(base).is_dir() else Path(cached_file(base, "config.json")).parent
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    stored = {}
    for path in filter(Path.is_file, files):
        file = open(path, "rb")  # noqa: SIM115 (open as long as its tensors may be read)
        size = int.from_bytes(file.read(8), "little")
        for name, entry in json.loads(file.read(size)).items():
            if entry.get("dtype") in _DTYPES:
                dtype, shape = _DTYPES[entry["dtype"]], torch.Size(entry["shape"])
                offset = 8 + size + entry["data_offsets"][0]
                stored[name] = StoredTensor(shape, (Piece(file, offset, dtype, shape.numel()),))
    return stored
