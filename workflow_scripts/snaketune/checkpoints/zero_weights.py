"""Finds the fp32 weights in a DeepSpeed checkpoint of any ZeRO stage and world size.

DeepSpeed's own `zero_to_fp32` unpickles the files without restriction. This module uses `weights_only=True`
and allows only the few harmless types that DeepSpeed stores. It reads the layout of DeepSpeed 0.19
(`deepspeed/utils/zero_to_fp32.py`).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import BinaryIO

import torch

from snaketune.checkpoints.stored_tensors import (
    Extent,
    StoredTensor,
    StoredTensors,
    cut,
    open_saved,
    stored_tensor,
)
from snaketune.common.cli import UserError


def read_zero_state_dict(folder: Path) -> StoredTensors:
    """Returns the weights by their names in the trained module. Reads each one when it is accessed.

    Args:
        folder: A folder with `*_model_states.pt` and, above stage 0, `*_optim_states.pt`.

    Raises:
        UserError: Files are missing, or some parameters are frozen (full fine-tuning freezes none).
    """
    optimizer_files = _by_rank(folder, "*_optim_states.pt")
    model_files = _by_rank(folder, "*_model_states.pt")
    if not model_files:
        raise UserError(
            f"{folder} holds no checkpoint", expected="mp_rank_00_model_states.pt or zero_pp_rank_*.pt"
        )
    model, file = open_saved(model_files[0], _STORED_TYPES)
    module = model["module"]
    if not optimizer_files:
        return StoredTensors({name: stored_tensor(fake, file) for name, fake in module.items()})
    shapes = model["param_shapes"]
    if any(model.get("frozen_param_shapes") or {}):
        raise UserError(
            f"{folder} has frozen parameters", expected="a checkpoint of full-parameter fine-tuning"
        )
    ranks = []
    for path in optimizer_files:
        content, opened = open_saved(path, _STORED_TYPES)
        ranks.append((content["optimizer_state_dict"], opened))
    join = _join_stage_3 if int(ranks[0][0]["zero_stage"]) == 3 else _join_stage_1_2
    stored = join(ranks, shapes)
    # The optimizer's parameters do not include buffers and tied weights.
    stored |= {name: stored_tensor(module[name], file) for name in model.get("buffer_names") or []}
    # LoRA's frozen weights are in no checkpoint, neither under their own names nor under those of tied ones.
    stored |= {alias: stored[name] for alias, name in _pairs(model.get("shared_params")) if name in stored}
    return StoredTensors(stored)


def _pairs(shared) -> list[tuple[str, str]]:
    return list(shared.items()) if isinstance(shared, dict) else [tuple(pair) for pair in shared or []]


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    numbers = {file: [int(n) for n in re.findall(r"rank_(\d+)", file.name)] for file in folder.glob(pattern)}
    return sorted(numbers, key=numbers.get)


class _Stored:
    """Stands in for DeepSpeed's record types, whose content is not used, so DeepSpeed is not imported."""


_STORED_TYPES = [
    (_Stored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Stored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Stored, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def _vector(tensors: list[torch.Tensor], file: BinaryIO) -> list[Extent]:
    return [extent for tensor in tensors for extent in stored_tensor(tensor, file).extents]


def _join_stage_1_2(ranks: list[tuple[dict, BinaryIO]], shapes: list[dict]) -> dict[str, StoredTensor]:
    """Each parameter group is one flat vector, padded at its end and split into one partition per rank."""
    stored = {}
    for group, group_shapes in enumerate(shapes):
        flat = [
            extent
            for state, file in ranks
            for extent in _vector([state["single_partition_of_fp32_groups"][group]], file)
        ]
        offset = 0
        for name, shape in group_shapes.items():
            stored[name] = StoredTensor(shape, cut(flat, offset, shape.numel()))
            offset += shape.numel()
    return stored


def _join_stage_3(ranks: list[tuple[dict, BinaryIO]], shapes: list[dict]) -> dict[str, StoredTensor]:
    """Each parameter is padded and split into one partition per rank; a rank's partitions are consecutive."""
    flats = [_vector(state["fp32_flat_groups"], file) for state, file in ranks]
    stored, offset = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        size = math.ceil(shape.numel() / len(ranks))
        parts = [extent for flat in flats for extent in cut(flat, offset, size)]
        stored[name] = StoredTensor(shape, cut(parts, 0, shape.numel()))
        offset += size
    return stored
