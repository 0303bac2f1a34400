"""Reads a training config: checks its shape, and says which paths and settings it trains with.

A config is an mmengine Python config whose types come from `sft`. Reading one does not import torch or DeepSpeed by
itself: imported names stay unresolved until the runner builds them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.config.lazy import LazyAttr, LazyObject

from common.cli import UserError

REQUIRED = ("model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "strategy")


def load_config(path: str | Path) -> Config:
    """Parses and checks a training config.

    Raises:
        UserError: It is missing, does not parse, or lacks a part.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist", fix="render one with render_train_config.py")
    # In a venv the standard library lies outside its prefix; mmengine would take `import os` for a third-party import.
    config_utils.PYTHON_ROOT_DIR = sys.base_prefix
    try:
        config = Config.fromfile(str(path))
    except Exception as error:  # the config is code: anything can go wrong in it
        raise UserError(
            f"{path} cannot be read as a training config",
            found=f"{type(error).__name__}: {error}",
            expected="a Python config as render_train_config.py writes it",
            fix="mend the line above, or render a fresh one and copy your changes over",
        ) from None
    _check(config, path)
    return config


def _check(config: Config, path: Path) -> None:
    values = plain(config)
    missing = [name for name in REQUIRED if not values.get(name)]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}",
            expected=", ".join(REQUIRED),
            fix="render a fresh config and compare",
        )
    foreign = sorted({text for text in _types(values) if text.split(".")[0] == "xtuner"})
    if foreign:
        raise UserError(
            f"{path} uses XTuner's own classes",
            found=", ".join(foreign),
            fix="render a config with render_train_config.py and copy your settings over",
        )
    dataset = values["train_dataloader"].get("dataset")
    source = "plan" if isinstance(dataset, dict) and dataset.get("plan") is not None else "folder"
    for keys in (("model", "llm", "model_path"), ("train_dataloader", "dataset", source)):
        value = values
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, str):
            raise UserError(f"{path}: {'.'.join(keys)} is not a path", found=value, expected="a string")
    batch_size = values["train_dataloader"].get("batch_size", 1)
    if batch_size != 1:
        raise UserError(
            f"{path}: batch_size must be 1 with packed rows",
            found=batch_size,
            fix="raise max_length instead: a longer row is a larger batch",
        )


def _types(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["type"]] if isinstance(value.get("type"), str) else []
        return own + [text for child in value.values() for text in _types(child)]
    return [text for child in value for text in _types(child)] if isinstance(value, list) else []


def plain(value: Any) -> Any:
    """Returns a config's values as JSON values; imported names become strings such as `sft.TrainLoop`."""
    if isinstance(value, Config):
        return plain(value._to_lazy_dict())
    if isinstance(value, dict):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if isinstance(value, LazyAttr):
        return f"{plain(value.source)}.{value.name}"
    if isinstance(value, LazyObject):
        return value.module if value._imported is None else f"{value.module}.{value._imported}"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)


def model_path(config: Config) -> str:
    """Returns the base model's folder or hub name."""
    return plain(config)["model"]["llm"]["model_path"]


def tokenizer_path(config: Config) -> str | None:
    """Returns the folder of the extended tokenizer that the model was grown for."""
    return plain(config)["model"].get("tokenizer")


def sequence_parallel(config: Config) -> int:
    """Returns how many ranks share the tokens of each row."""
    return plain(config)["strategy"].get("sequence_parallel", 1)


def data_ranks(config: Config, world_size: int) -> int:
    """Returns how many ranks see rows of their own: ranks that share their rows count as one.

    Raises:
        UserError: The ranks do not make whole groups.
    """
    size = sequence_parallel(config)
    if size < 1 or world_size % size:
        raise UserError(
            f"{world_size} ranks do not make groups of sequence_parallel = {size}",
            expected="a number of ranks that sequence_parallel divides",
            fix="change sequence_parallel, or the number of ranks (train.processes, --processes)",
        )
    return world_size // size


def global_batch(config: Config, world_size: int) -> int:
    """Returns the packed rows of an optimizer step, over all ranks and micro-batches."""
    wrapper = plain(config)["optim_wrapper"]
    return wrapper.get("global_batch") or wrapper.get("accumulative_counts", 1) * data_ranks(
        config, world_size
    )


def micro_batches_per_step(config: Config, world_size: int) -> int:
    """Returns the micro-batches of a rank per optimizer step.

    Raises:
        UserError: The ranks cannot share the rows of a step evenly.
    """
    rows, ranks = global_batch(config, world_size), data_ranks(config, world_size)
    if rows % ranks:
        groups = "ranks" if ranks == world_size else "groups of ranks"
        raise UserError(
            f"{ranks} {groups} cannot share the {rows} rows of an optimizer step evenly",
            found=f"global_batch = {rows}",
            fix="use a number of ranks that divides it, or change global_batch (which makes it another run)",
        )
    return rows // ranks


def lora_settings(config: Config) -> dict | None:
    """Returns the LoRA settings, None when all parameters are trained."""
    return plain(config)["model"].get("lora")


def training_dtype(config: Config) -> str:
    """Returns `auto`, `float32`, `bfloat16` or `float16`."""
    return plain(config)["model"]["llm"].get("dtype", "auto")


def plan_path(config: Config) -> str | None:
    """Returns the plan folder, if the config names one."""
    return plain(config)["train_dataloader"]["dataset"].get("plan")


def train_folder(config: Config) -> str | None:
    """Returns `.../chatml_llamav13_32k/train`, if the config names it."""
    return plain(config)["train_dataloader"]["dataset"].get("folder")


def data_order_path(config: Config) -> str | None:
    """Returns the `data_order.txt`, if the config names one."""
    return plain(config)["train_dataloader"]["dataset"].get("data_order_path")
