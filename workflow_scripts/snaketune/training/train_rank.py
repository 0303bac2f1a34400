"""Runs one rank of a training, from joining the process group to recording the finished run."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from torch import distributed

from snaketune.checkpoints.checkpoint_folders import is_intact, saved_world_size, set_aside, step_of
from snaketune.checkpoints.pinned import PinPolicy, pin_finished
from snaketune.checkpoints.universal import make_universal
from snaketune.common.cli import UserError
from snaketune.common.result_paths import METRICS
from snaketune.training.crash_guard import begin_attempt, check_guard, clear_guard, record_crash
from snaketune.training.deepspeed_strategy import DeepSpeedStrategy, init_process_group  # noqa: F401 (before any other mmengine strategy)
from snaketune.training.early_stop import EXIT_RESUME, StopRequest
from snaketune.training.metrics_file import cut_metrics
from snaketune.training.run_lock import LockTaken, RunLock
from snaketune.training.run_state import (
    RunState,
    find_run_state,
    open_run_folder,
    record_finished_run,
    write_manifest,
)
from snaketune.training.train_config import TrainConfig


def train_rank(
    config: TrainConfig,
    config_path: Path,
    work_dir: Path | None,
    runs_dir: Path | None,
    manifest: Path | None,
    time_limit: float | None = None,
    ignore_guard: bool = False,
    pins: PinPolicy | None = None,
) -> int:
    """Runs this rank of a training. RANK, WORLD_SIZE and so on must be set.

    Args:
        config: The training config.
        config_path: File that the config was read from.
        work_dir: The run folder, or None.
        runs_dir: The folder of run folders, or None.
        manifest: File for the record of the finished run, or None.
        time_limit: Minutes from the start of the job until it is killed.
        ignore_guard: True starts even if the last attempts all crashed at the same step.
        pins: Which checkpoints to pin for evaluation.

    Returns:
        0 if the run is finished, EXIT_RESUME if it was saved to be resumed later.

    Raises:
        UserError: The user has to fix something. Only one rank per host raises it; the others raise
            SystemExit(2).
    """
    try:
        return _train_rank(
            config, config_path, work_dir, runs_dir, manifest, time_limit, ignore_guard, pins or PinPolicy()
        )
    except UserError:
        if os.environ["LOCAL_RANK"] != "0":
            raise SystemExit(2) from None
        raise


def _train_rank(
    config, config_path, work_dir, runs_dir, manifest, time_limit, ignore_guard, pins: PinPolicy
) -> int:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Setting (OMP|MKL)_NUM_THREADS")
    stop = StopRequest(time_limit)
    stop.listen()
    init_process_group()
    try:
        state, lock = _agree_on_state(config, config_path, work_dir, runs_dir, ignore_guard)
    except (UserError, SystemExit):
        distributed.destroy_process_group()
        raise
    finished = True
    try:
        if not state.trained:
            finished = _train(config, state, stop, pins)
            if distributed.get_rank() == 0:
                clear_guard(state.folder)
        if finished and distributed.get_rank() == 0:
            if not state.finished:
                record_finished_run(state, config, config_path)
            if state.trained:
                pin_finished(state.folder, pins)
            if manifest is not None:
                write_manifest(state, manifest)
            print(f"Finished: {state.folder}", flush=True)
    except BaseException as error:
        if not state.trained:
            record_crash(state.folder, error)
        raise
    finally:
        if lock is not None:
            lock.release()
    distributed.barrier()
    distributed.destroy_process_group()  # otherwise a process sometimes aborts at exit
    return 0 if finished else EXIT_RESUME


def _agree_on_state(config, config_path, work_dir, runs_dir, ignore_guard) -> tuple[RunState, RunLock | None]:
    """Rank 0 finds the run state and takes the lock. All ranks use its state and verify the checkpoint."""
    world_size = distributed.get_world_size()
    lock = corrupt = None
    while True:
        answer: list = ["failed"]
        error = None
        if distributed.get_rank() == 0:
            try:
                if corrupt is not None:
                    print(f"warning: {corrupt} is corrupt; renamed to {set_aside(corrupt).name}", flush=True)
                if lock is None:
                    state = find_run_state(config, work_dir, runs_dir, world_size)
                    lock = open_run_folder(state, config_path)
                    if ignore_guard:
                        clear_guard(state.folder)
                    check_guard(state.folder, state.folder / METRICS)
                # Read the state again, now that no other trainer can change it.
                answer[0] = find_run_state(config, work_dir, runs_dir, world_size, announce=False)
            except LockTaken as owner:
                print(
                    f"Another trainer is running in the run folder: {owner}. Start again after it ends.",
                    flush=True,
                )
                answer[0] = "taken"
            except UserError as caught:
                error = caught
        distributed.broadcast_object_list(answer)
        if error is not None:
            if lock is not None:
                lock.release()
            raise error
        if answer[0] in ("failed", "taken"):
            raise SystemExit(EXIT_RESUME if answer[0] == "taken" else 2)
        corrupt = answer[0].checkpoint
        if answer[0].finished or _is_intact_together(corrupt):
            break
    state = answer[0]
    if distributed.get_rank() == 0 and not state.trained:
        metrics, step = state.folder / METRICS, step_of(state.checkpoint) if state.checkpoint else 0
        begin_attempt(state.folder, metrics, step)
        cut_metrics(metrics, step)
    return state, lock


def _is_intact_together(checkpoint: Path | None) -> bool:
    """True, on all ranks, if a checkpoint matches its digests. Each rank reads its share of the files."""
    if checkpoint is None:
        return True
    verdicts: list = [None] * distributed.get_world_size()
    mine = is_intact(checkpoint, distributed.get_rank(), len(verdicts))
    distributed.all_gather_object(verdicts, mine)
    return all(verdicts)


def _train(config: TrainConfig, state: RunState, stop: StopRequest, pins: PinPolicy) -> bool:
    """Trains to the end, or until the run has to stop early. Returns True if it reached the end."""
    from snaketune.training.train_loop import TrainRunner

    if distributed.get_rank() != 0:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()

    other_ranks = state.checkpoint and saved_world_size(state.checkpoint) != distributed.get_world_size()
    universal = make_universal(state.checkpoint) if other_ranks and config.zero_stage > 0 else None
    runner = TrainRunner.from_cfg(runner_config(config, state.folder, universal is not None))
    runner.resume_from, runner.universal, runner.stop = state.checkpoint, universal, stop
    runner.pins = pins
    runner.train()
    if runner.iter == runner.max_iters:
        return True
    if distributed.get_rank() == 0:
        print(
            f"Stopped after step {runner.iter} of {runner.max_iters} ({stop.reason}); start again to resume",
            flush=True,
        )
    return False


def runner_config(settings: TrainConfig, folder: Path, universal: bool = False) -> Config:
    """Returns the config for mmengine's runner, with the run folder `folder`.

    Like XTuner's `train.py`, moves clipping and accumulation from the optimizer wrapper to DeepSpeed. With
    `universal`, DeepSpeed loads a universal checkpoint.
    """
    config = copy.deepcopy(settings.source)
    config.model.llm.model_path = settings.model_path
    wrapper = config.optim_wrapper
    accumulation = settings.micro_batches_per_step(distributed.get_world_size())
    optimizer = wrapper.optimizer
    if optimizer["type"] is torch.optim.AdamW:
        optimizer.setdefault("fused", True)  # 12 times as fast on a CPU
    clipping = (wrapper.get("clip_grad") or {}).get("max_norm", 0)
    config.optim_wrapper = ConfigDict(type="DeepSpeedOptimWrapper", optimizer=optimizer)
    config.strategy.setdefault("gradient_clipping", clipping)
    config.strategy.setdefault("dtype", settings.dtype)
    config.strategy.zero_stage = settings.zero_stage
    config.strategy.sequence_parallel = settings.sequence_parallel
    config.strategy.gradient_accumulation_steps = accumulation
    config.strategy.train_micro_batch_size_per_gpu = 1
    if settings.sequence_parallel > 1:
        config.train_dataloader.sampler.sequence_parallel = settings.sequence_parallel
    if universal:
        config.strategy.config = {
            **(config.strategy.get("config") or {}),
            "checkpoint": {"load_universal": True},
        }
    config.train_cfg.accumulative_counts = accumulation
    config.train_cfg.max_epochs, config.train_cfg.max_steps = settings.max_epochs, settings.max_steps
    hooks = config.get("default_hooks") or ConfigDict()
    if hooks.get("checkpoint"):
        hooks.checkpoint.interval = settings.save_steps
    for name in ("runtime_info", "timer", "logger", "sampler_seed"):  # replaced by our own
        hooks.setdefault(name, None)
    config.default_hooks = hooks
    config.env_cfg = config.get("env_cfg") or ConfigDict()
    config.launcher = "pytorch"
    config.work_dir = str(folder)
    config.log_level = config.get("log_level", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return config
