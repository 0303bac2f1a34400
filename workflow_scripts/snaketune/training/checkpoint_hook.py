"""The hook that saves: a whole checkpoint now and then, and after the last step; and holds some for evaluation."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook

from snaketune.checkpoints.checkpoint_folders import prune_checkpoints, remove_leftovers, write_checkpoint
from snaketune.checkpoints.pinned import pin
from snaketune.common.cli import UserError
from snaketune.common.result_paths import PINNED
from snaketune.training.nonfinite_steps import weights_are_finite
from snaketune.training.progress_line import say

_FULL = 1 << 20  # bytes free: a disk is full


class CheckpointHook(Hook):
    """Saves a whole checkpoint every `interval` optimizer steps, after the last step, and before the run stops early.

    Nothing is saved while steps are being skipped, so that a resumed run skips the same ones, nor when a weight is not
    finite: the checkpoints from before such a step are kept. What `runner.pins` asks for is held, once in all attempts,
    before older ones are removed; where nothing is saved at such a step, its weights alone are written for that.

    Args:
        interval: Steps between checkpoints; 0 saves after the last step only.
        save_optimizer: False saves the weights alone: smaller, and training cannot be resumed from it.
        max_keep_ckpts: Newest checkpoints to keep; -1 keeps all.
    """

    priority = "VERY_LOW"

    def __init__(self, interval: int, save_optimizer: bool = True, max_keep_ckpts: int = 2):
        self.interval, self.save_optimizer, self.max_keep_ckpts = interval, save_optimizer, max_keep_ckpts

    def before_train(self, runner) -> None:
        """Expects of the first save, for the time limit, weights and two moments in fp32 at 100 MB/s, and 5 s."""
        to_pin = [None]
        if is_main_process():
            to_pin = [runner.pins.open(Path(runner.work_dir), runner.iter, runner.max_iters)]
        broadcast_object_list(
            to_pin
        )  # a save is for all ranks, which may not see the same files at this moment
        self.to_pin = to_pin[0]
        weights = sum(getattr(p, "ds_numel", p.numel()) for p in runner.model.model.module.parameters())
        runner.stop.saved(5 + 12 * weights / runner.world_size / 100e6)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Saves when it is time."""
        step = batch_idx + 1
        last = step == runner.max_iters
        save = last or runner.stop.agreed or (self.interval > 0 and step % self.interval == 0)
        save = save and (last or not runner.train_loop.skipped.in_a_row)
        held = step in self.to_pin
        if not (save or held):
            return
        if not weights_are_finite(runner.model.model):
            if last:
                raise UserError(
                    f"the weights are not finite after the last step, {step}",
                    fix="lower lr, or raise warmup_ratio; the last checkpoint is from before that",
                )
            if is_main_process():
                print(f"warning: weights are not finite after step {step}: not saved", flush=True)
            return
        started = time.monotonic()
        self._save(runner, step, save, held)
        runner.stop.saved(time.monotonic() - started)

    def _save(self, runner, step: int, save: bool, held: bool) -> None:
        folder = Path(runner.work_dir)
        engine, total = runner.model.model, runner.max_iters
        try:
            if save:
                state = {"step": step, "param_schedulers": runner.strategy.scheduler_state_dict()}
                write_checkpoint(engine, folder, step, total, state, self.save_optimizer)
            else:
                write_checkpoint(engine, folder / PINNED, step, total, {}, save_optimizer=False)
            if held and is_main_process():
                pin(folder, step)
        except BaseException:
            if shutil.disk_usage(folder).free < _FULL:  # torch's own message does not say so
                print(f"No space left to save step {step} in {folder}: free some", flush=True)
            if is_main_process():
                remove_leftovers(folder)  # the disk may be full, and the next start needs a few kilobytes
                remove_leftovers(folder / PINNED)
            raise
        if is_main_process() and save:
            say(f"Saved {folder / f'iter_{step}.pth'}")
            prune_checkpoints(folder, self.max_keep_ckpts)
