"""The hook that saves: a whole checkpoint now and then, and after the last step."""

from __future__ import annotations

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from sft.checkpoints import prune_checkpoints, write_checkpoint


class CheckpointHook(Hook):
    """Saves a whole checkpoint every `interval` optimizer steps and after the last step.

    Args:
        interval: Steps between checkpoints; 0 saves after the last step only.
        save_optimizer: False saves the weights alone: smaller, and training cannot be resumed from it.
        max_keep_ckpts: Newest checkpoints to keep; -1 keeps all.
    """

    priority = "VERY_LOW"

    def __init__(self, interval: int = 500, save_optimizer: bool = True, max_keep_ckpts: int = 2):
        self.interval, self.save_optimizer, self.max_keep_ckpts = interval, save_optimizer, max_keep_ckpts

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Saves when it is time."""
        step = batch_idx + 1
        if step != runner.max_iters and (self.interval <= 0 or step % self.interval):
            return
        folder = Path(runner.work_dir)
        state = {"step": step, "param_schedulers": runner.strategy.scheduler_state_dict()}
        target = write_checkpoint(
            runner.model.model, folder, step, runner.max_iters, state, self.save_optimizer
        )
        if is_main_process():
            print(f"Saved {target}", flush=True)
            prune_checkpoints(folder, self.max_keep_ckpts)
