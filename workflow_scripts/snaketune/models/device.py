"""Chooses the device that this host trains on, its dtype, and an attention that it can compute."""

from __future__ import annotations

import torch

from snaketune.common.cli import UserError


def training_device() -> str:
    """Returns `cuda` if torch sees a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def attention_on(device: str, name: str) -> str:
    """Returns the attention of a training for this device: a CPU computes `eager` in place of a GPU's kernel.

    Args:
        device: `cpu` or `cuda`.
        name: `train.attention`.
    """
    return name if device == "cuda" or name in ("auto", "sdpa", "eager") else "eager"


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Returns the torch dtype for a config's `dtype`: `auto` is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        UserError: torch does not have this dtype.
    """
    if name == "auto":
        name = "bfloat16" if device == "cuda" else "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError("unknown training dtype", found=name, expected="auto, float32, bfloat16 or float16")
    return dtype


def check_dtype(dtype: torch.dtype, device: str) -> None:
    """Checks that this device can train in a dtype. Creates a CUDA context.

    Raises:
        UserError: A GPU computes bfloat16 only by emulation (V100, T4 and older), which takes many times as long; or
            float16 on a CPU, which DeepSpeed does not support.
    """
    if device == "cpu" and dtype == torch.float16:
        raise UserError(
            "a CPU cannot train in float16",
            found="dtype: float16",
            expected="float32 or bfloat16",
            fix="set train.dtype to float32",
        )
    if device != "cuda" or dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False):
        return
    raise UserError(
        f"{torch.cuda.get_device_name()} cannot train in bfloat16",
        found="dtype: auto or bfloat16",
        expected="float16, with a loss scale, or float32",
        fix="set train.dtype to float16 or float32",
    )
