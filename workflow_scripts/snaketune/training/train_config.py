"""Reads, checks and parses a training config.

The file is an mmengine Python config whose types come from `sft`. Reading it does not import torch or
DeepSpeed: imported names stay unresolved until the runner builds them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.config.lazy import LazyAttr, LazyObject

from snaketune.common.cli import UserError

REQUIRED = ("model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "strategy")


@dataclass(frozen=True)
class TrainConfig:
    """A parsed training config. Only `parse_config` defines the defaults of missing keys.

    Attributes:
        source: The mmengine config. `snaketune.training.train_rank.runner_config` derives the runner's config
            from a copy of it.
        values: The same config as JSON values, without defaults: the source of the run identity.
        model_path: Base model: a folder or a hub name.
        tokenizer_path: Folder of the extended tokenizer, which the model grows to fit; None leaves the model
            unchanged.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        attention: `auto`, `sdpa`, `flash_attention_2`, or any other name that transformers knows.
        lora: LoRA settings, see `snaketune.models.lora.add_lora`; None trains all parameters.
        data: Arguments of `snaketune.packing.planner.plan_for_training`.
        max_epochs: Passes over the data.
        max_steps: Optimizer steps; None trains for `max_epochs`.
        accumulative_counts: Micro-batches per rank and optimizer step, unless `step_rows` is set.
        step_rows: Packed sequences per optimizer step over all ranks (`global_batch` in the file), or None.
        zero_stage: 0 to 3.
        sequence_parallel: Ranks that share the tokens of each packed sequence.
        save_steps: Optimizer steps between checkpoints; 0 saves only at the end.
    """

    source: Config
    values: dict[str, Any]
    model_path: str
    tokenizer_path: str | None
    dtype: str
    attention: str
    lora: dict[str, Any] | None
    data: dict[str, Any]
    max_epochs: float | None
    max_steps: int | None
    accumulative_counts: int
    step_rows: int | None
    zero_stage: int
    sequence_parallel: int
    save_steps: int

    @property
    def plan(self) -> str | None:
        """The pack plan folder, or None."""
        return self.data.get("plan")

    @property
    def train_folder(self) -> str | None:
        """The train folder `.../chatml_llamav13_32k/train`, or None."""
        return self.data.get("folder")

    @property
    def data_order(self) -> str | None:
        """The path of `data_order.txt`, or None."""
        return self.data.get("data_order_path")

    def data_ranks(self, world_size: int) -> int:
        """Returns the number of ranks with different data. Ranks that share packed sequences count as one.

        Raises:
            UserError: `sequence_parallel` does not divide the number of ranks.
        """
        size = self.sequence_parallel
        if size < 1 or world_size % size:
            raise UserError(
                f"cannot divide {world_size} ranks into groups of sequence_parallel = {size}",
                expected="a multiple of sequence_parallel",
                fix="change sequence_parallel, or the number of ranks (train.processes, --processes)",
            )
        return world_size // size

    def global_batch(self, world_size: int) -> int:
        """Returns the packed sequences per optimizer step, over all ranks and micro-batches."""
        return self.step_rows or self.accumulative_counts * self.data_ranks(world_size)

    def micro_batches_per_step(self, world_size: int) -> int:
        """Returns the micro-batches per rank and optimizer step.

        Raises:
            UserError: The ranks cannot share the packed sequences of a step evenly.
        """
        rows, ranks = self.global_batch(world_size), self.data_ranks(world_size)
        if rows % ranks:
            groups = "ranks" if ranks == world_size else "groups of ranks"
            raise UserError(
                f"{ranks} {groups} cannot evenly share the {rows} packed sequences of an optimizer step",
                found=f"global_batch = {rows}",
                fix="use a number of ranks that divides it, or change global_batch, which starts a new run",
            )
        return rows // ranks


def load_config(path: str | Path, zero_stage: int | None = None) -> TrainConfig:
    """Reads, checks and parses a training config.

    Args:
        path: The file.
        zero_stage: Overrides the stage in the file.

    Raises:
        UserError: The file is missing, does not parse or lacks a part, or a value is invalid.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist", fix="render one with render_train_config.py")
    # In a venv, the standard library is outside sys.prefix, so mmengine would take `os` for third-party.
    config_utils.PYTHON_ROOT_DIR = sys.base_prefix
    try:
        config = Config.fromfile(str(path))
    except Exception as error:  # the config is code, which can raise anything
        raise UserError(
            f"{path} cannot be read as a training config",
            found=f"{type(error).__name__}: {error}",
            expected="a Python config as render_train_config.py writes it",
            fix="fix the error above, or render a new config and copy your changes to it",
        ) from None
    values = plain(config)
    _check(values, path)
    if zero_stage is not None:
        config.strategy.zero_stage = values["strategy"]["zero_stage"] = zero_stage
    return parse_config(config, values)


def parse_config(config: Config, values: dict[str, Any] | None = None) -> TrainConfig:
    """Extracts the settings from a config that has all its parts.

    Args:
        config: The config as read by mmengine.
        values: `plain(config)`, if already computed.

    Raises:
        UserError: A value is invalid.
    """
    values = plain(config) if values is None else values
    model, wrapper, strategy = values["model"], values["optim_wrapper"], values["strategy"]
    loop, hooks = values["train_cfg"], values.get("default_hooks") or {}
    stage = strategy.get("zero_stage", 2)
    if stage not in (0, 1, 2, 3):
        raise UserError("invalid zero_stage", found=stage, expected="0, 1, 2 or 3")
    return TrainConfig(
        source=config,
        values=values,
        model_path=model["llm"]["model_path"],
        tokenizer_path=model.get("tokenizer"),
        dtype=model["llm"].get("dtype", "auto"),
        attention=model["llm"].get("attention", "auto"),
        lora=model.get("lora"),
        data={key: each for key, each in values["train_dataloader"]["dataset"].items() if key != "type"},
        max_epochs=loop.get("max_epochs", 1),
        max_steps=loop.get("max_steps"),
        accumulative_counts=wrapper.get("accumulative_counts", 1),
        step_rows=wrapper.get("global_batch"),
        zero_stage=stage,
        sequence_parallel=strategy.get("sequence_parallel", 1),
        save_steps=(hooks.get("checkpoint") or {}).get("interval", 500),
    )


def _check(values: dict[str, Any], path: Path) -> None:
    missing = [name for name in REQUIRED if not values.get(name)]
    if missing:
        raise UserError(
            f"{path} does not define {', '.join(missing)}",
            expected=", ".join(REQUIRED),
            fix="render a new config and compare",
        )
    foreign = sorted({text for text in _types(values) if text.split(".")[0] == "xtuner"})
    if foreign:
        raise UserError(
            f"{path} uses XTuner's own classes",
            found=", ".join(foreign),
            fix="render a config with render_train_config.py and copy your settings to it",
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
            f"{path}: batch_size must be 1 with packed sequences",
            found=batch_size,
            fix="raise max_length instead: a longer packed sequence is a larger batch",
        )


def _types(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["type"]] if isinstance(value.get("type"), str) else []
        return own + [text for child in value.values() for text in _types(child)]
    return [text for child in value for text in _types(child)] if isinstance(value, list) else []


def plain(value: Any) -> Any:
    """Returns a config's values as JSON values. Imported names become strings such as `sft.TrainLoop`."""
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
