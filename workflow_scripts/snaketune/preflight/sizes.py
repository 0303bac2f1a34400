"""Compares the disk space that runs need, from their models' configurations, with the free space."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketune.preflight.check import Check
from snaketune.settings.schema import default_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Bytes of .bin per byte of JSONL. Measured: 1.6 to 1.9.
_TOKENIZED = 2.5


def embedding_rows(model_path: str, trust_remote_code: bool = default_of("model.trust_remote_code")) -> int:
    """Returns the number of rows of a model's embedding."""
    from snaketune.export.hf_tensors import empty_model

    return empty_model(model_path, trust_remote_code).get_input_embeddings().weight.shape[0]


def count_parameters(model: PreTrainedModel, lora_rank: int | None = None) -> tuple[int, int]:
    """Returns the number of all weights, tied ones counted once, and of the trained weights.

    For LoRA, counts the adapters of the default `target_modules`, which it adds to the model, and neglects the rows of
    new tokens.
    """
    from snaketune.models.lora import add_lora, trained_share

    weights = sum(parameter.numel() for parameter in model.parameters())
    if lora_rank is None:
        return weights, weights
    add_lora(model, {"rank": lora_rank, "alpha": lora_rank}, [])
    return weights, trained_share(model)[0]


def checkpoint_bytes(trained: int, dtype: str, zero_stage: int, save_optimizer: bool) -> int:
    """Returns the bytes of a checkpoint with the given number of trained weights."""
    # AdamW's two moments in fp32, plus an fp32 copy of the weights with ZeRO 1 to 3.
    optimizer = 0 if not save_optimizer else 12 if zero_stage else 8
    return trained * (BYTES[dtype] + optimizer)


def run_bytes(run: Mapping[str, Any]) -> dict[str, int]:
    """Returns the maximum bytes that a run writes: checkpoints, hf, turbomind.

    While a checkpoint is written, the `save_total_limit` kept ones still exist.

    Args:
        run: `model`, `trust_remote_code`, `dtype` and `hf_dtype` (resolved), `zero_stage`, `save_optimizer`,
            `save_total_limit`, `turbomind` (bool), `lora_rank` (None: all weights are trained and saved).
    """
    from snaketune.export.hf_tensors import empty_model

    model = empty_model(run["model"], run["trust_remote_code"])
    weights, trained = count_parameters(model, run["lora_rank"])
    checkpoint = checkpoint_bytes(trained, run["dtype"], run["zero_stage"], run["save_optimizer"])
    return {
        "checkpoints": checkpoint * (run["save_total_limit"] + 1),
        "hf": weights * BYTES[run["hf_dtype"]],
        "turbomind": weights * 2 if run["turbomind"] else 0,
    }


def check_disk(results: Path, runs: Sequence[Mapping[str, Any]], jsonl_bytes: int) -> Check:
    """Compares the bytes that all runs write with the free disk space.

    Does not subtract files that already exist.

    Args:
        results: An existing folder on the disk.
        runs: See `run_bytes`.
        jsonl_bytes: Bytes of the conversations that are not tokenised yet.
    """
    parts = {"tokenised data": int(_TOKENIZED * jsonl_bytes)}
    for run in runs:
        for name, size in run_bytes(run).items():
            parts[name] = parts.get(name, 0) + size
    needed, free = sum(parts.values()), shutil.disk_usage(results).free
    shares = ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in parts.items() if size)
    found = f"needs up to {needed / 1e9:,.2f} GB ({shares}), {free / 1e9:,.1f} GB free"
    if needed <= free:
        return Check("disk", True, found)
    return Check(
        "disk",
        False,
        found,
        f"free {(needed - free) / 1e9:,.1f} GB, set results_dir to another disk, or lower train.save_total_limit",
    )
