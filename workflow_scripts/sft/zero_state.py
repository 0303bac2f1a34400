"""Reads the fp32 weights out of a DeepSpeed checkpoint of any ZeRO stage and world size.

DeepSpeed's own `zero_to_fp32` unpickles the files without restriction; here `weights_only=True` and a list of the
few harmless types that DeepSpeed stores. The layout is that of DeepSpeed 0.19 (`deepspeed/utils/zero_to_fp32.py`).
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from common.cli import UserError


def read_zero_state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights by their names in the trained module.

    Args:
        folder: A folder with `*_model_states.pt` and, above stage 0, `*_optim_states.pt`.

    Raises:
        UserError: Files are missing, or some parameters were frozen (not written by full fine-tuning).
    """
    optimizer_files = _by_rank(folder, "*_optim_states.pt")
    model_files = _by_rank(folder, "*_model_states.pt")
    if not model_files:
        raise UserError(
            f"{folder} holds no checkpoint", expected="mp_rank_00_model_states.pt or zero_pp_rank_*.pt"
        )
    model = _load(model_files[0])
    if not optimizer_files:
        return dict(model["module"])
    shapes = model["param_shapes"]
    if any(model.get("frozen_param_shapes") or {}):
        raise UserError(
            f"{folder} has frozen parameters", expected="a checkpoint of full-parameter fine-tuning"
        )
    parts = [_load(file)["optimizer_state_dict"] for file in optimizer_files]
    if int(parts[0]["zero_stage"]) == 3:
        state = _join_stage_3(parts, shapes)
    else:
        state = _join_stage_1_2(parts, shapes)
    # Buffers and tied weights are not among the optimizer's parameters.
    state.update({name: model["module"][name] for name in model.get("buffer_names") or []})
    state.update({alias: state[name] for alias, name in _pairs(model.get("shared_params"))})
    return state


def _pairs(shared) -> list[tuple[str, str]]:
    return list(shared.items()) if isinstance(shared, dict) else [tuple(pair) for pair in shared or []]


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    numbers = {file: [int(n) for n in re.findall(r"rank_(\d+)", file.name)] for file in folder.glob(pattern)}
    return sorted(numbers, key=numbers.get)


class _Stored:
    """Stands in for DeepSpeed's plain record types: nothing of them is used, and DeepSpeed need not be imported."""


_STORED_TYPES = [
    (_Stored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Stored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Stored, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def _load(file: Path) -> dict:
    with torch.serialization.safe_globals(_STORED_TYPES):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _join_stage_1_2(parts: list[dict], shapes: list[dict]) -> dict[str, torch.Tensor]:
    """Each group of parameters is one flat vector, cut into one piece a rank, padded at its end."""
    state = {}
    for group, group_shapes in enumerate(shapes):
        pieces = [part["single_partition_of_fp32_groups"][group] for part in parts]
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        offset = 0
        for name, shape in group_shapes.items():
            state[name] = flat[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()
    return state


def _join_stage_3(parts: list[dict], shapes: list[dict]) -> dict[str, torch.Tensor]:
    """Each parameter is cut into one piece a rank, padded at its end; a rank's pieces lie end to end."""
    flats = []
    for part in parts:
        groups = part["fp32_flat_groups"]
        flats.append(groups[0] if len(groups) == 1 else torch.cat(list(groups)))
    state, offset = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        piece = math.ceil(shape.numel() / len(parts))
        whole = torch.cat([flat[offset : offset + piece] for flat in flats])
        state[name] = whole[: shape.numel()].view(shape)
        offset += piece
    return state
