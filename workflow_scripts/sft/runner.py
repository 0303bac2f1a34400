"""The training loop and its runner: one iteration is one optimizer step, wherever the run was cut off before."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from mmengine.runner import FlexibleRunner
from mmengine.runner.base_loop import BaseLoop
from torch.utils.data import DataLoader

from common.cli import UserError
from sft.checkpoints import load_random_state
from sft.data import PackedSampler


class TrainLoop(BaseLoop):
    """Trains for a number of optimizer steps, each over `accumulative_counts` micro-batches of every rank.

    Hooks and schedulers are called once per optimizer step. Micro-batches run on across epochs, as in XTuner; a last
    incomplete step is not trained.

    Args:
        runner: The runner.
        dataloader: The loader, or its config.
        max_epochs: Passes over the data, whole or not.
        max_steps: Optimizer steps; overrides `max_epochs`.
        accumulative_counts: Micro-batches of a rank per optimizer step.
    """

    def __init__(
        self,
        runner: FlexibleRunner,
        dataloader: DataLoader | dict,
        max_epochs: float | None = 1,
        max_steps: int | None = None,
        accumulative_counts: int = 1,
    ):
        super().__init__(runner, dataloader)
        self.accumulative_counts = accumulative_counts
        self.micro_batches_per_epoch = len(self.dataloader)
        if not self.micro_batches_per_epoch:
            raise UserError(
                "there are fewer packed rows than ranks",
                found=f"{len(self.dataloader.dataset)} rows for {runner.world_size} ranks",
                fix="set max_length lower, add data, or use fewer ranks",
            )
        self._max_iters = max_steps or int(max_epochs * self.micro_batches_per_epoch / accumulative_counts)
        if self._max_iters < 1:
            raise UserError(
                "the data does not fill one optimizer step",
                found=f"{self.micro_batches_per_epoch} packed rows a rank and epoch",
                expected=f"at least {accumulative_counts} (accumulative_counts) in {max_epochs} epochs",
                fix="set max_length or accumulative_counts lower, max_epochs higher, or add data",
            )
        self._iter = 0
        # Its own generator: opening an epoch must not move the model's random state (resume is bit for bit).
        self.dataloader.generator = torch.Generator()

    @property
    def max_iters(self) -> int:
        """Optimizer steps of the whole run."""
        return self._max_iters

    @property
    def max_epochs(self) -> int:
        """mmengine's schedulers ask for it; the length of the run is in `max_iters`."""
        return 1

    @property
    def iter(self) -> int:
        """Optimizer steps done."""
        return self._iter

    @property
    def epoch(self) -> float:
        """Passes over the data done."""
        return self._iter * self.accumulative_counts / self.micro_batches_per_epoch

    def seek(self, step: int) -> None:
        """Goes on after optimizer step `step`."""
        self._iter = step

    def run(self) -> torch.nn.Module:
        """Trains to the end and returns the model."""
        runner = self.runner
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        stream = self._micro_batches()
        if runner.random_state_folder is not None:
            load_random_state(runner.random_state_folder, runner.rank)
        while self._iter < self._max_iters:
            started = time.perf_counter()
            runner.model.train()
            batches = [next(stream) for _ in range(self.accumulative_counts)]
            runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=batches)
            losses = [
                runner.model.train_step(batch, optim_wrapper=runner.optim_wrapper)["loss"].detach()
                for batch in batches
            ]
            labels = [batch["data"]["labels"] for batch in batches]
            outputs = {
                "loss": torch.stack(losses).double().mean(),
                "tokens": sum(label.numel() for label in labels),
                "trained_tokens": sum(int((label[:, 1:] != -100).sum()) for label in labels),
                "started": started,
            }
            runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=batches, outputs=outputs)
            self._iter += 1
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    def _micro_batches(self):
        """Yields micro-batches for ever, from the one that follows `iter` on; nothing before it is read."""
        sampler: PackedSampler = self.dataloader.batch_sampler.sampler
        position = self._iter * self.accumulative_counts
        while True:
            sampler.seek(*divmod(position, self.micro_batches_per_epoch))
            for batch in self.dataloader:
                position += 1
                yield batch


class _NoVisualizer:
    """Metrics go to MetricsHook's files; mmengine's visualizer has nothing to draw."""

    def add_config(self, config) -> None:
        pass


class TrainRunner(FlexibleRunner):
    """mmengine's runner that goes on from a whole checkpoint of ours."""

    resume_from: Path | None = None
    random_state_folder: Path | None = None

    def _log_env(self) -> None:
        """Versions are in the manifest; mmengine's collection starts compilers to ask theirs."""

    def build_visualizer(self, visualizer=None):
        """Returns a stand-in, see above."""
        return _NoVisualizer()

    def load_or_resume(self) -> None:
        """Loads `resume_from`, if it is set."""
        if self.resume_from is not None:
            client_state = self.strategy.resume(str(self.resume_from))
            self.train_loop.seek(client_state["step"])
            self.random_state_folder = self.resume_from

    def dump_config(self) -> None:
        """The config is copied into the run folder as it was written, see train_model.py."""
