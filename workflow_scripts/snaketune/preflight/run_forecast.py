"""Forecasts steps, tokens, hours, disk and memory of a run from its settings and pack plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from snaketune.common.cli import UserError
from snaketune.models.positions import Positions
from snaketune.packing.pack_plan import open_plan
from snaketune.preflight.memory_forecast import SETTINGS, Shape, process_memory
from snaketune.preflight.sizes import BYTES, checkpoint_bytes
from snaketune.training.metrics_file import whole_lines

GIB = 2**30


def make_run_plan(
    config: Mapping[str, Any],
    pack_plan: Path,
    shape: Shape,
    positions: Positions,
    *,
    gpus: int,
    device_gib: float,
    tokens_per_second: float | None,
) -> dict[str, Any]:
    """Returns the forecast of a run.

    Args:
        config: The run's settings.
        pack_plan: Folder of the pack plan, which has every length.
        shape: Shape of the model.
        positions: The lengths that the base was made for.
        gpus: Number of GPUs, with one process each; 0 for CPU processes, `train.processes` or one.
        device_gib: Memory of a GPU, or the memory available to a CPU process.
        tokens_per_second: Total of all processes; None if unknown, then hours are None.

    Raises:
        UserError: The data does not fill an optimizer step, or documents are longer than learned positions.
    """
    train = config["train"]
    ranks = gpus or train["processes"] or 1
    readers = ranks // train["sequence_parallel"]
    plan = open_plan(pack_plan)
    lengths = plan.slice_lengths
    positions.require(int(lengths.max()))
    rows = plan.entries_per_epoch(readers)
    batch = train["global_batch"] or train["accumulative_counts"] * readers
    steps = train["max_steps"] or int(train["max_epochs"] * rows) // batch
    if not steps:
        raise UserError(
            "the data does not fill one optimizer step",
            found=f"{rows} packed sequences per epoch, {train['max_epochs']} epochs",
            expected=f"at least {batch} packed sequences",
        )
    packed = int((plan.slices["stop"] - plan.slices["start"]).sum())
    tokens = round(packed / len(plan) * steps * batch)
    seconds = tokens / tokens_per_second if tokens_per_second else None
    dtype = train["dtype"] if train["dtype"] != "auto" else ("bfloat16" if gpus else "float32")
    memory = []
    for stage, offload in SETTINGS:
        if (offload != "none" and not gpus) or (stage == 0 and dtype != "float32"):
            continue
        need = process_memory(
            shape,
            dtype_bytes=BYTES[dtype],
            zero_stage=stage,
            offload=offload,
            ranks=ranks,
            row_tokens=plan.max_length // train["sequence_parallel"],
            gradient_checkpointing=train["gradient_checkpointing"],
            on_gpu=bool(gpus),
        )
        fits = need["device"] <= device_gib * GIB
        memory.append(
            {
                "zero_stage": stage,
                "offload": offload,
                "device_gib": round(need["device"] / GIB, 3),
                "host_gib": round(need["host"] * ranks / GIB, 3),
                # Of a lower bound, only that it does not fit is certain.
                "fits": None if shape.unknown and fits else fits,
                "chosen": (stage, offload) == (train["zero_stage"], train["offload"]),
                "parts": need["parts"],
            }
        )
    checkpoint = checkpoint_bytes(shape.trained, dtype, train["zero_stage"], train["save_optimizer"])
    return {
        "format": 1,
        "gpus": gpus,
        "ranks": ranks,
        "dtype": dtype,
        "device_gib": device_gib,
        "parameters": shape.parameters,
        "trained_parameters": shape.trained,
        "documents": {
            "longest": int(lengths.max()),
            "positions": positions.limit,
            "beyond_positions": int((lengths > (positions.limit or np.inf)).sum()),
            "window": positions.window,
            "beyond_window": int((lengths > (positions.window or np.inf)).sum()),
        },
        "rows": rows,
        "steps": steps,
        "tokens": tokens,
        "epochs": round(steps * batch / rows, 4),
        "tokens_per_second": tokens_per_second,
        "hours": None if seconds is None else round(seconds / 3600, 4),
        "gpu_hours": None if seconds is None else round(seconds / 3600 * gpus, 4),
        "checkpoint_gb": round(checkpoint / 1e9, 3),
        # While one is written, the kept ones still exist.
        "checkpoints_gb": round(checkpoint * (train["save_total_limit"] + 1) / 1e9, 3),
        "activations_unknown": shape.unknown,
        "memory": memory,
    }


def measured_speed(metrics: Path) -> float:
    """Returns the median tokens per second of the steps in a metrics.jsonl.

    Raises:
        UserError: The file has no step.
    """
    speeds = sorted(values["tokens_per_second"] for _, values in whole_lines(metrics))
    if not speeds:
        raise UserError(f"{metrics} has no step", fix="pass --tokens-per-second")
    return speeds[len(speeds) // 2]
