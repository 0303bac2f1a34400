"""The hook that saves checkpoints, and pins some of them for evaluation."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook

from snaketune.checkpoints.checkpoint_content import write_checkpoint
from snaketune.checkpoints.checkpoint_folders import prune_checkpoints, remove_leftovers
from snaketune.checkpoints.pinned import pin
from snaketune.common.cli import UserError
from snaketune.common.result_paths import PINNED
from snaketune.settings.schema import default_of
from snaketune.training.nonfinite_steps import weights_are_finite
from snaketune.training.progress_line import say

_FULL = 1 << 20  # with fewer bytes free, the disk counts as full


class CheckpointHook(Hook):
    """Saves checkpoints every `interval` optimizer steps, after the last step, and before stopping early.

    Saves nothing while steps are being skipped, so that a resumed run skips the same ones, and nothing if a
    weight is not finite, so the earlier checkpoints remain. Pins the steps that `runner.pins` asks for, once
    across all attempts, before removing older checkpoints. If a step to pin is not saved otherwise, only its
    weights are written.

    Args:
        interval: Steps between checkpoints; 0 saves only after the last step.
        save_optimizer: False saves only the weights: smaller, but training cannot resume from them.
        max_keep_ckpts: Number of newest checkpoints to keep; -1 keeps all.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        interval: int,
        save_optimizer: bool = default_of("train.save_optimizer"),
        max_keep_ckpts: int = default_of("train.save_total_limit"),
    ):
        self.interval, self.save_optimizer, self.max_keep_ckpts = interval, save_optimizer, max_keep_ckpts

    def before_train(self, runner) -> None:
        """Estimates the time of the first save: weights and two moments in fp32 at 100 MB/s, plus 5 s."""
        to_pin = [None]
        if is_main_process():
            to_pin = [runner.pins.open(Path(runner.work_dir), runner.iter, runner.max_iters)]
        # All ranks save together, but may not see the same files right now.
        broadcast_object_list(to_pin)
        self.to_pin = to_pin[0]
        weights = sum(getattr(p, "ds_numel", p.numel()) for p in runner.model.model.module.parameters())
        runner.stop.saved(5 + 12 * weights / runner.world_size / 100e6)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Saves if a checkpoint is due after this step."""
        step = batch_idx + 1
        last = step == runner.max_iters
        save = last or runner.stop.agreed or (self.interval > 0 and step % self.interval == 0)
        save = save and (last or not runner.train_loop.skipped.in_a_row)
        pinned = step in self.to_pin
        if not (save or pinned):
            return
        if not weights_are_finite(runner.model.model):
            if last:
                raise UserError(
                    f"the weights are not finite after the last step, {step}",
                    fix="lower lr, or raise warmup_ratio; the last checkpoint still has finite weights",
                )
            if is_main_process():
                print(f"warning: weights are not finite after step {step}; not saved", flush=True)
            return
        started = time.monotonic()
        self._save(runner, step, save, pinned)
        runner.stop.saved(time.monotonic() - started)

    def _save(self, runner, step: int, save: bool, pinned: bool) -> None:
        folder = Path(runner.work_dir)
        engine, total = runner.model.model, runner.max_iters
        try:
            if save:
                state = {"step": step, "param_schedulers": runner.strategy.scheduler_state_dict()}
                write_checkpoint(engine, folder, step, total, state, self.save_optimizer)
            else:
                write_checkpoint(engine, folder / PINNED, step, total, {}, save_optimizer=False)
            if pinned and is_main_process():
                pin(folder, step)
        except BaseException:
            if shutil.disk_usage(folder).free < _FULL:  # torch's error does not say so
                print(f"No space left to save step {step} in {folder}; free some disk space", flush=True)
            if is_main_process():
                remove_leftovers(folder)  # if the disk is full, the next start still needs a few kilobytes
                remove_leftovers(folder / PINNED)
            raise
        if is_main_process() and save:
            say(f"Saved {folder / f'iter_{step}.pth'}")
            prune_checkpoints(folder, self.max_keep_ckpts)
