"""Trains: one process of a run, from its place among the ranks to the finished record."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from torch import distributed

from common.cli import UserError
from sft.checkpoints import is_intact, set_aside
from sft.session import Plan, open_run_folder, plan_run, record_finished_run, write_manifest
from sft.strategy import DeepSpeedStrategy, init_process_group  # noqa: F401 (before any other mmengine strategy)


def train_rank(
    config: Config, config_path: Path, work_dir: Path | None, runs_dir: Path | None, manifest: Path | None
) -> None:
    """Runs this process' part of a run; RANK, WORLD_SIZE and so on are set.

    Raises:
        UserError: Something to mend; only one rank a host says it, the others end with SystemExit(2).
    """
    try:
        _train_rank(config, config_path, work_dir, runs_dir, manifest)
    except UserError:
        if os.environ["LOCAL_RANK"] != "0":
            raise SystemExit(2) from None
        raise


def _train_rank(config, config_path, work_dir, runs_dir, manifest) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Setting (OMP|MKL)_NUM_THREADS")
    init_process_group()
    try:
        plan, lock = _plan_together(config, config_path, work_dir, runs_dir)
    except (UserError, SystemExit):
        distributed.destroy_process_group()
        raise
    if not plan.trained:
        _train(config, plan)
    if distributed.get_rank() == 0:
        if not plan.finished:
            record_finished_run(plan, config, config_path)
        if manifest is not None:
            write_manifest(plan, manifest)
        print(f"Finished: {plan.folder}", flush=True)
        lock.close()
    distributed.barrier()
    distributed.destroy_process_group()  # without it a process now and then aborts at exit


def _plan_together(config, config_path, work_dir, runs_dir) -> tuple[Plan, object]:
    """Rank 0 looks at the disk and takes the lock; all ranks follow its plan, and read what they go on from."""
    world_size = distributed.get_world_size()
    lock = corrupt = None
    while True:
        answer: list = ["failed"]
        error = None
        if distributed.get_rank() == 0:
            try:
                if corrupt is not None:
                    print(
                        f"warning: {corrupt} is corrupt; set aside as {set_aside(corrupt).name}", flush=True
                    )
                if lock is None:
                    lock = open_run_folder(plan_run(config, work_dir, runs_dir, world_size), config_path)
                # Again, now that nobody else writes there.
                answer[0] = plan_run(config, work_dir, runs_dir, world_size, announce=False)
            except UserError as caught:
                error = caught
        distributed.broadcast_object_list(answer)
        if error is not None:
            raise error
        if answer[0] == "failed":
            raise SystemExit(2)
        corrupt = answer[0].checkpoint
        if answer[0].finished or _is_intact_together(corrupt):
            return answer[0], lock


def _is_intact_together(checkpoint: Path | None) -> bool:
    """Reads a checkpoint's bytes, each rank its share of the files, and tells all ranks whether they are right."""
    if checkpoint is None:
        return True
    verdicts: list = [None] * distributed.get_world_size()
    mine = is_intact(checkpoint, distributed.get_rank(), len(verdicts))
    distributed.all_gather_object(verdicts, mine)
    return all(verdicts)


def _train(config: Config, plan: Plan) -> None:
    from sft.runner import TrainRunner

    if distributed.get_rank() != 0:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()

    runner = TrainRunner.from_cfg(runner_config(config, plan.folder))
    runner.resume_from = plan.checkpoint
    runner.train()


def runner_config(config: Config, folder: Path) -> Config:
    """Returns the config in the form that mmengine's runner takes, for the run folder `folder`.

    As XTuner's `train.py`: clipping and accumulation move from the optimizer wrapper to DeepSpeed.
    """
    config = copy.deepcopy(config)
    wrapper = config.optim_wrapper
    accumulation = wrapper.get("accumulative_counts", 1)
    optimizer = wrapper.optimizer
    if optimizer["type"] is torch.optim.AdamW:
        optimizer.setdefault("fused", True)  # on CPU a twelfth of the time
    clipping = (wrapper.get("clip_grad") or {}).get("max_norm", 0)
    config.optim_wrapper = ConfigDict(type="DeepSpeedOptimWrapper", optimizer=optimizer)
    config.strategy.setdefault("gradient_clipping", clipping)
    config.strategy.setdefault("dtype", config.model.llm.get("dtype", "auto"))
    config.strategy.gradient_accumulation_steps = accumulation
    config.strategy.train_micro_batch_size_per_gpu = 1
    config.train_cfg.accumulative_counts = accumulation
    hooks = config.get("default_hooks") or ConfigDict()
    for name in ("runtime_info", "timer", "logger", "sampler_seed"):  # ours do their work
        hooks.setdefault(name, None)
    config.default_hooks = hooks
    config.env_cfg = config.get("env_cfg") or ConfigDict()
    config.launcher = "pytorch"
    config.work_dir = str(folder)
    config.log_level = config.get("log_level", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return config
