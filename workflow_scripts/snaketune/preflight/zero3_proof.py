"""Proves, on a twin, that an architecture trains correctly with ZeRO-3: two ranks take the same steps as a plain loop.

The ranks train on the CPU as a run does: its strategy, loop, optimizer and checkpoint. The plain loop sees one document at
a time, in transformers' plain attention. ZeRO-3 gathers a module's weights when the module is called; a model that reads
weights in another way, or whose ranks call different modules, fails, waits forever, or trains something else.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel

from snaketune.checkpoints.checkpoint_content import read_state_dict
from snaketune.common.cli import UserError
from snaketune.common.result_paths import METRICS
from snaketune.models.isolation import Row, logits_of, random_row
from snaketune.models.twin import VOCABULARY, make_twin
from snaketune.preflight.architecture_proof import TrainingOptions, trained_twin
from snaketune.tokenized.bin_reader import IGNORE_INDEX
from snaketune.training.launch import die_with_parent, end_all, free_port, thread_limits, wait_all
from snaketune.training.metrics_file import whole_lines

RANKS, STEPS, _GLOBAL_BATCH = 2, 2, 2
# Documents of the packed sequences of all steps. Four tokens reach fewer experts than a hundred: the ranks differ.
_PACKED = ((45, 61), (4,), (17, 12, 38), (50, 9))
_SINGLE = ((45,), (4,), (30,), (61,))
# With an epsilon above most gradients, AdamW's moves grow with a gradient, so its size counts, and its rounding does not.
_OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-2, "weight_decay": 0.01}
# DeepSpeed keeps weights below 100,000 elements whole; most of a twin's are smaller than its base's.
_SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
_SEEDS = (0, 1)  # a router may choose between two equal experts by rounding: one of two twins has to be right
_BOUND = 1e-3  # of the losses
_MOVE_BOUND = 1e-2  # of a weight's root mean square move
# gloo sees that the sizes differ; NCCL on GPUs would wait.
_APART = "the ranks do not gather the same weights, and would wait for each other forever"
_IDLE_SECONDS = 60.0
_IDLE_SHARE = 0.02  # of one CPU that waiting ranks use at most


def prove_zero_3(
    config: PretrainedConfig, options: TrainingOptions, idle_seconds: float = _IDLE_SECONDS
) -> dict[str, Any]:
    """Trains twins of a base with ZeRO-3 on two ranks.

    Args:
        config: The base's config.
        options: The training's settings; `prove` accepts them. `lora` is not used.
        idle_seconds: Time without any computation after which the ranks count as hanging.

    Returns:
        {"name", "difference", "bound"} as in `snaketune.preflight.architecture_proof.prove`: the difference of the
        parameter that differs most, as a share of how far all weights have moved, both by root mean square.

    Raises:
        UserError: The ranks fail, wait for each other forever, or train something else than the plain loop.
    """
    for number, seed in enumerate(_SEEDS):
        twin = make_twin(
            config, longest=options.max_length, trust_remote_code=options.trust_remote_code, seed=seed
        )
        try:
            return _prove(twin, options, idle_seconds)
        except _Difference as error:
            if number + 1 == len(_SEEDS):
                raise _refusal(config, str(error)) from None
    raise AssertionError("no seed")


class _Difference(Exception):
    """What differs from the plain loop."""


def _refusal(config: PretrainedConfig, found: str) -> UserError:
    return UserError(
        f"{config.model_type} cannot be trained with ZeRO-3",
        found=found,
        expected="the steps of a plain loop, on two ranks",
        fix="set train.zero_stage: 2",
    )


def _prove(twin: PreTrainedModel, options: TrainingOptions, idle_seconds: float) -> dict[str, Any]:
    lengths = _SINGLE if options.packing == "single" else _PACKED
    rows = [random_row(VOCABULARY, each, seed) for seed, each in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problem = _train_on_ranks(trained_twin(twin, options), options, rows, folder, idle_seconds)
        if problem:
            raise _refusal(twin.config, problem)
        losses = [values["loss"] for _, values in whole_lines(folder / METRICS)]
        ours = dict(read_state_dict(folder / f"iter_{STEPS}.pth").items())
    before = {key: value.detach().clone() for key, value in twin.named_parameters() if value.requires_grad}
    if lost := sorted(before.keys() - ours.keys()):
        raise _refusal(twin.config, f"the checkpoint lacks {len(lost)} weights, {lost[0]} among them")
    expected = _plain_loop(twin, rows)
    for step, (loss, right) in enumerate(zip(losses, expected, strict=True)):
        if not abs(loss - right) <= _BOUND * abs(right):
            raise _Difference(f"loss {loss:.6f} instead of {right:.6f} in step {step + 1}")
    after = {key: each.detach() for key, each in twin.named_parameters() if key in before}
    moved = _root_mean_square([after[key] - before[key] for key in before])
    apart = {key: _root_mean_square([ours[key] - after[key]]) / moved for key in before}
    name, worst = max(apart.items(), key=lambda each: (math.isnan(each[1]), each[1]))
    if not worst <= _MOVE_BOUND:
        raise _Difference(f"{name} differs by {worst:.2g} of the weights' moves after {STEPS} steps")
    return {
        "name": "two steps with ZeRO-3 on two ranks = those of a plain loop",
        "difference": float(f"{worst:.2g}"),
        "bound": _MOVE_BOUND,
    }


def _root_mean_square(tensors: Sequence[torch.Tensor]) -> float:
    total = sum(each.double().square().sum().item() for each in tensors)
    return math.sqrt(total / sum(each.numel() for each in tensors))


def _plain_loop(model: PreTrainedModel, rows: Sequence[Row]) -> list[float]:
    """Trains a model in place with one document at a time. Returns the losses of the steps."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, **_OPTIMIZER)
    losses = []
    model.train()
    for first in range(0, len(rows), _GLOBAL_BATCH):
        documents = [each for row in rows[first : first + _GLOBAL_BATCH] for each in row.documents()]
        targets = sum(each.ids.shape[1] - 1 for each in documents)
        total = 0.0
        for each in documents:
            logits = logits_of(model, each)[:-1]
            loss = cross_entropy(logits, each.ids[0, 1:], reduction="sum") / targets
            loss.backward()
            total += loss.item()
        losses.append(total)
        for parameter in trained:  # DeepSpeed steps all parameters, also those that no token reaches
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _train_on_ranks(
    model: PreTrainedModel, options: TrainingOptions, rows: Sequence[Row], folder: Path, idle_seconds: float
) -> str | None:
    """Runs the ranks in forked processes. Returns what went wrong in words, or None."""
    shared = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **thread_limits(1)}
    context = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(RANKS):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        given = (os.getpid(), environment, model, options, rows, folder)
        ranks.append(context.Process(target=_be_rank, args=given))
        ranks[-1].start()
    try:
        seen, since = 0.0, time.monotonic()
        while any(rank.exitcode is None for rank in ranks):
            if any(rank.exitcode for rank in ranks):
                wait_all(ranks, patience=2.0)  # the other may still say why
                break
            time.sleep(0.1)
            if (used := _cpu_seconds(ranks)) > seen + _IDLE_SHARE * idle_seconds:
                seen, since = used, time.monotonic()
            elif time.monotonic() > since + idle_seconds:
                return "hangs: the ranks wait for each other"
    finally:
        end_all(ranks)
    if not any(rank.exitcode for rank in ranks):
        return None
    said = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.error"))]
    said.sort(key=lambda each: each == _APART)  # a rank that lost the other says so too
    return said[0] if said else f"a rank ended with code {max(abs(rank.exitcode or 0) for rank in ranks)}"


def _cpu_seconds(ranks: Sequence[BaseProcess]) -> float:
    import psutil

    total = 0.0
    for rank in ranks:
        try:
            times = psutil.Process(rank.pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _be_rank(
    parent: int,
    environment: dict[str, Any],
    model: PreTrainedModel,
    options: TrainingOptions,
    rows: Sequence[Row],
    folder: Path,
) -> None:
    die_with_parent(parent)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the progress of two steps
    os.environ.update({key: str(value) for key, value in environment.items()})
    try:
        _train(model, options, rows, folder)
    except BaseException as error:
        (folder / f"{environment['RANK']}.error").write_text(_words(error), encoding="utf-8")
        traceback.print_exc()
        os._exit(1)  # without waiting for the other rank
    torch.distributed.destroy_process_group()


def _words(error: BaseException) -> str:
    if isinstance(error, UserError) and error.found is not None:
        return str(error.found).splitlines()[0]
    lines = str(error).strip().splitlines() or [""]
    if "gloo" in lines[0]:
        return _APART
    return f"{type(error).__name__}: {lines[0][:200]}"


def _train(model: PreTrainedModel, options: TrainingOptions, rows: Sequence[Row], folder: Path) -> None:
    from snaketune.training.deepspeed_strategy import init_process_group
    from snaketune.training.train_config import parse_config
    from snaketune.training.train_loop import TrainRunner
    from snaketune.training.train_rank import runner_config

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    init_process_group()
    config = _config(model, options, rows)
    TrainRunner.from_cfg(runner_config(parse_config(config), folder)).train()
    torch.distributed.barrier()


def _config(model: PreTrainedModel, options: TrainingOptions, rows: Sequence[Row]):
    """Returns a training config for a model in memory."""
    from mmengine.config import Config
    from torch.utils.data import BatchSampler

    from snaketune.training.checkpoint_hook import CheckpointHook
    from snaketune.training.deepspeed_strategy import DeepSpeedStrategy
    from snaketune.training.metrics_hook import MetricsHook
    from snaketune.training.packed_data import PackedSampler, packed_collate
    from snaketune.training.supervised_finetune import SupervisedFinetune
    from snaketune.training.train_loop import TrainLoop

    return Config(
        {
            "model": {
                "type": SupervisedFinetune,
                "gradient_checkpointing": options.gradient_checkpointing,
                "router_aux_loss": 0.0,  # as in the twin
                "llm": {"type": lambda **_: model, "model_path": "", "dtype": "float32"},
            },
            "train_dataloader": {
                "batch_size": 1,
                "num_workers": 0,
                "dataset": {"type": lambda: RowsInOrder([_packed(each) for each in rows], options.packing)},
                "sampler": {"type": PackedSampler},
                "batch_sampler": {"type": BatchSampler, "drop_last": True, "batch_size": 1},
                "collate_fn": {"type": packed_collate},
            },
            "optim_wrapper": {
                "optimizer": {"type": torch.optim.AdamW, **_OPTIMIZER},
                "accumulative_counts": _GLOBAL_BATCH // RANKS,
            },
            "param_scheduler": [],
            "train_cfg": {"type": TrainLoop, "max_steps": STEPS},
            "strategy": {"type": DeepSpeedStrategy, "zero_stage": 3, "config": _SHARD_ALL},
            "default_hooks": {
                "metrics": {"type": MetricsHook, "interval": STEPS},
                "param_scheduler": None,
                "checkpoint": {"type": CheckpointHook, "interval": 0},
            },
            "randomness": {"seed": 1},
        }
    )


def _packed(row: Row) -> dict[str, np.ndarray]:
    """Returns a packed sequence as a plan gives it. All tokens but the first of each document are trained."""
    labels = row.ids[0].clone()
    labels[row.boundaries[:-1]] = IGNORE_INDEX
    return {
        "input_ids": row.ids[0].numpy(),
        "labels": labels.numpy(),
        "position_ids": row.inputs()["position_ids"][0].numpy(),
        "cumulative_len": np.array(row.boundaries),
    }


class RowsInOrder(Dataset):
    """Packed sequences in memory that are their own plan: every epoch has all of them, in order.

    Args:
        rows: With `input_ids`, `labels`, `position_ids` (tokens) and `cumulative_len` (documents + 1).
        mode: As `packing.mode`.
    """

    def __init__(self, rows: Sequence[dict[str, np.ndarray]], mode: str):
        self.rows, self.mode, self.plan = rows, mode, self
        self.slice_lengths = np.array([max(np.diff(row["cumulative_len"]).max() for row in rows)])

    def entries_per_epoch(self, world_size: int) -> int:
        return len(self.rows)

    def order(self, epoch: int) -> range:
        return range(len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return self.rows[number]
