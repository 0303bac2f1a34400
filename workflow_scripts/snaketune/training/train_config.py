"""A training config, read from its file, checked and parsed once.

The file is an mmengine Python config whose types come from `sft`. Reading one does not import torch or DeepSpeed by
itself: imported names stay unresolved until the runner builds them.
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
    """A parsed training config. `parse_config` states the defaults of keys that a file leaves out, and nothing else does.

    Attributes:
        source: The mmengine config, from a copy of which `snaketune.training.train_rank.runner_config` makes the runner's.
        values: The same as JSON values, without defaults: what the identity of a run is made from.
        model_path: Base model, a folder or a hub name.
        tokenizer_path: Folder of the extended tokenizer that the model grows to; None leaves the model as it is.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        lora: LoRA settings, see `snaketune.models.lora.add_lora`; None trains all parameters.
        data: Arguments of `snaketune.packing.planner.plan_for_training`.
        max_epochs: Passes over the data.
        max_steps: Optimizer steps; None trains `max_epochs`.
        accumulative_counts: Micro-batches of a rank per optimizer step, unless `step_rows` is set.
        step_rows: Packed rows of an optimizer step over all ranks (`global_batch` in the file), or None.
        zero_stage: 0 to 3.
        sequence_parallel: Ranks that share the tokens of each row.
        save_steps: Optimizer steps between checkpoints; 0 saves at the end only.
    """

    source: Config
    values: dict[str, Any]
    model_path: str
    tokenizer_path: str | None
    dtype: str
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
        """The plan folder, if the config names one."""
        return self.data.get("plan")

    @property
    def train_folder(self) -> str | None:
        """`.../chatml_llamav13_32k/train`, if the config names it."""
        return self.data.get("folder")

    @property
    def data_order(self) -> str | None:
        """The `data_order.txt`, if the config names one."""
        return self.data.get("data_order_path")

    def data_ranks(self, world_size: int) -> int:
        """Returns how many ranks see rows of their own: ranks that share their rows count as one.

        Raises:
            UserError: The ranks do not make whole groups.
        """
        size = self.sequence_parallel
        if size < 1 or world_size % size:
            raise UserError(
                f"{world_size} ranks do not make groups of sequence_parallel = {size}",
                expected="a number of ranks that sequence_parallel divides",
                fix="change sequence_parallel, or the number of ranks (train.processes, --processes)",
            )
        return world_size // size

    def global_batch(self, world_size: int) -> int:
        """Returns the packed rows of an optimizer step, over all ranks and micro-batches."""
        return self.step_rows or self.accumulative_counts * self.data_ranks(world_size)

    def micro_batches_per_step(self, world_size: int) -> int:
        """Returns the micro-batches of a rank per optimizer step.

        Raises:
            UserError: The ranks cannot share the rows of a step evenly.
        """
        rows, ranks = self.global_batch(world_size), self.data_ranks(world_size)
        if rows % ranks:
            groups = "ranks" if ranks == world_size else "groups of ranks"
            raise UserError(
                f"{ranks} {groups} cannot share the {rows} rows of an optimizer step evenly",
                found=f"global_batch = {rows}",
                fix="use a number of ranks that divides it, or change global_batch (which makes it another run)",
            )
        return rows // ranks


def load_config(path: str | Path, zero_stage: int | None = None) -> TrainConfig:
    """Reads, checks and parses a training config.

    Args:
        path: The file.
        zero_stage: Takes the place of the one in the file.

    Raises:
        UserError: The file is missing, does not parse, or lacks a part, or a value cannot be used.
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
    values = plain(config)
    _check(values, path)
    if zero_stage is not None:
        config.strategy.zero_stage = values["strategy"]["zero_stage"] = zero_stage
    return parse_config(config, values)


def parse_config(config: Config, values: dict[str, Any] | None = None) -> TrainConfig:
    """Takes the settings out of a config that has all its parts.

    Args:
        config: As mmengine reads it.
        values: `plain(config)`, if it is known.

    Raises:
        UserError: A value cannot be used.
    """
    values = plain(config) if values is None else values
    model, wrapper, strategy = values["model"], values["optim_wrapper"], values["strategy"]
    loop, hooks = values["train_cfg"], values.get("default_hooks") or {}
    stage = strategy.get("zero_stage", 2)
    if stage not in (0, 1, 2, 3):
        raise UserError("zero_stage cannot be used", found=stage, expected="0, 1, 2 or 3")
    return TrainConfig(
        source=config,
        values=values,
        model_path=model["llm"]["model_path"],
        tokenizer_path=model.get("tokenizer"),
        dtype=model["llm"].get("dtype", "auto"),
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
