"""The training loop and its runner. One iteration is one optimizer step, also after resuming."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from mmengine.runner import FlexibleRunner
from mmengine.runner.base_loop import BaseLoop
from torch import distributed
from torch.utils.data import DataLoader

from snaketune.checkpoints.checkpoint_content import load_random_state
from snaketune.checkpoints.pinned import PinPolicy
from snaketune.checkpoints.universal import remove_universal
from snaketune.common.cli import UserError
from snaketune.models.positions import read_positions
from snaketune.settings.schema import default_of
from snaketune.training.early_stop import StopRequest
from snaketune.training.first_forward import refuse_unsupported
from snaketune.training.isolation_check import require_isolated_documents
from snaketune.training.nonfinite_steps import SkippedSteps, replace_zero_0_step
from snaketune.training.packed_data import PackedSampler, read_ahead
from snaketune.training.supervised_finetune import (
    count_trained_tokens,
    step_loss_weights,
    step_row_weights,
)


class TrainLoop(BaseLoop):
    """Trains for a number of optimizer steps, each over `accumulative_counts` micro-batches per rank.

    Hooks and schedulers are called once per optimizer step. A step may span two epochs, as in XTuner; a last
    incomplete step is not trained. `snaketune.training.packed_data.PackedSampler` decides which packed
    sequences a step sees.

    Attributes:
        steps_per_epoch: Optimizer steps per pass over the data; usually fractional.

    Args:
        runner: The runner.
        dataloader: The loader, or its config.
        max_epochs: Passes over the data; may be fractional.
        max_steps: Optimizer steps; overrides `max_epochs`.
        accumulative_counts: Micro-batches per rank and optimizer step.
        loss_normalisation: `token` or `micro_batch`, see
            `snaketune.training.supervised_finetune.step_loss_weights`.
        max_skipped_steps: Steps in a row that may be skipped because their loss or gradient is not finite.
    """

    def __init__(
        self,
        runner: FlexibleRunner,
        dataloader: DataLoader | dict,
        max_epochs: float | None,
        max_steps: int | None,
        accumulative_counts: int,
        loss_normalisation: str = default_of("train.loss_normalisation"),
        max_skipped_steps: int = default_of("train.max_skipped_steps"),
    ):
        super().__init__(runner, dataloader)
        if loss_normalisation not in ("token", "micro_batch"):
            raise UserError(
                "invalid loss_normalisation", found=loss_normalisation, expected="token or micro_batch"
            )
        self.loss_normalisation = loss_normalisation
        self.accumulative_counts = accumulative_counts
        self.sampler: PackedSampler = self.dataloader.batch_sampler.sampler
        self.sequence_parallel = runner.strategy.sequence_parallel
        entries, ranks = self.sampler.entries_per_epoch, self.sampler.world_size
        global_batch = accumulative_counts * ranks
        if not entries:
            raise UserError(
                "there are fewer packed sequences than ranks",
                found=f"{len(self.dataloader.dataset)} packed sequences for {ranks} ranks",
                fix="lower max_length, add data, or use fewer ranks",
            )
        self.steps_per_epoch = runner.strategy.steps_per_epoch = entries / global_batch
        self._max_iters = max_steps or int(max_epochs * entries) // global_batch
        if self._max_iters < 1:
            raise UserError(
                "the data does not fill one optimizer step",
                found=f"{entries} packed sequences per epoch, {max_epochs} epochs",
                expected=f"at least {global_batch} (accumulative_counts for each of {ranks} ranks)",
                fix="lower max_length or accumulative_counts, raise max_epochs, or add data",
            )
        self._iter = 0
        self.skipped = SkippedSteps(max_skipped_steps)
        # A separate generator: starting an epoch must not change the global random state (bit-exact resume).
        self.dataloader.generator = torch.Generator()

    @property
    def max_iters(self) -> int:
        """Number of optimizer steps of the whole run."""
        return self._max_iters

    @property
    def max_epochs(self) -> int:
        """Read by mmengine's schedulers. The length of the run is `max_iters`."""
        return 1

    @property
    def iter(self) -> int:
        """Number of optimizer steps done."""
        return self._iter

    @property
    def epoch(self) -> float:
        """Number of passes over the data done."""
        return self._iter / self.steps_per_epoch

    def seek(self, step: int) -> None:
        """Makes `run` resume after optimizer step `step`."""
        self._iter = step

    def run(self) -> torch.nn.Module:
        """Trains to the end, or until all ranks agree to stop, and returns the model."""
        runner = self.runner
        engine = runner.model.model
        replace_zero_0_step(engine)
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        plan, model = self.sampler.plan, engine.module.llm
        read_positions(model).require(int(plan.slice_lengths.max()))
        if plan.mode != "single":
            with refuse_unsupported(model):
                require_isolated_documents(model)
        stream = self._micro_batches()
        if runner.random_state_folder is not None:
            load_random_state(runner.random_state_folder, runner.rank)
        while self._iter < self._max_iters and not runner.stop.agreed:
            started = time.perf_counter()
            runner.model.train()
            batches = [next(stream) for _ in range(self.accumulative_counts)]
            data_seconds = time.perf_counter() - started
            runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=batches)
            outputs = {**self._train_step(batches), "started": started, "data_seconds": data_seconds}
            outputs["skipped"] = self.skipped.count(engine)
            runner.stop.agree(engine.device)
            runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=batches, outputs=outputs)
            self._iter += 1
            self.skipped.check(self, self._iter, outputs["micro_batch_losses"])
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    def _train_step(self, batches: list[dict]) -> dict:
        """Runs forward and backward for the micro-batches of one step. DeepSpeed steps after the last.

        Returns:
            loss: This rank's contribution to the loss of the step, a float64 scalar tensor. The loss of the
                step is the sum over the ranks, see
                `snaketune.training.supervised_finetune.step_loss_weights`.
            aux_loss: The same for the router's loss, see `step_row_weights`, without its coefficient; None if there
                is none.
            tokens, trained_tokens: Totals of this rank's packed sequences. Among ranks that share them, only
                the first counts them.
            micro_batch_losses: Contribution of each micro-batch to `loss`, times the number of micro-batches
                and ranks.
            document_lengths: Tokens of each document in these packed sequences.
        """
        runner = self.runner
        rows = [batch["data"] for batch in batches]
        trained_tokens = [count_trained_tokens(row["labels"]) for row in rows]
        shared = self.sequence_parallel
        weights = step_loss_weights(trained_tokens, self.loss_normalisation, runner.model.device, shared.size)
        model = runner.model.model.module
        row_weights = [0.0] * len(rows)
        if model.router_aux_loss:
            row_tokens = [row["labels"].numel() for row in rows]
            row_weights = step_row_weights(row_tokens, self.loss_normalisation, runner.model.device)
        # DeepSpeed divides gradients by micro-batches x ranks. Undo it: our weights already normalise them.
        divisor = self.accumulative_counts * runner.world_size
        losses, aux_losses = [], []
        for batch, row, weight, row_weight in zip(batches, rows, weights, row_weights, strict=True):
            data = {
                **shared.stretch(row),
                "loss_weight": weight * divisor,
                "aux_weight": row_weight * divisor,
            }
            outputs = runner.model.train_step({**batch, "data": data}, optim_wrapper=runner.optim_wrapper)
            losses.append(outputs["loss"].detach())
            if model.router_aux_loss:
                aux_losses.append(outputs["aux_loss"].detach() / model.router_aux_loss)
        if shared.rank > 0:
            rows, trained_tokens = [], []
        boundaries = [row["cumulative_len"] for row in rows]
        return {
            "loss": torch.stack(losses).double().sum() / divisor,
            "aux_loss": torch.stack(aux_losses).double().sum() / divisor if aux_losses else None,
            "micro_batch_losses": losses,
            "tokens": sum(row["labels"].numel() for row in rows),
            "trained_tokens": sum(trained_tokens),
            "document_lengths": [length for b in boundaries for length in (b[1:] - b[:-1]).tolist()],
        }

    def _micro_batches(self):
        """Yields micro-batches without end, starting after step `iter`. Reads nothing before that."""
        self.sampler.seek(self._iter * self.accumulative_counts)
        batches = iter(self.dataloader)
        # Worker processes read ahead by themselves.
        return batches if self.dataloader.num_workers else read_ahead(batches, self.accumulative_counts)


class _NoVisualizer:
    """Replaces mmengine's visualizer: MetricsHook writes the metrics."""

    def add_config(self, config) -> None:
        pass


class TrainRunner(FlexibleRunner):
    """mmengine's runner, resuming from our checkpoints."""

    stop = StopRequest()
    pins = PinPolicy()
    resume_from: Path | None = None
    universal: Path | None = None
    random_state_folder: Path | None = None

    def _log_env(self) -> None:
        """Does nothing: the manifest has the versions, and mmengine would start compilers to get theirs."""

    def build_visualizer(self, visualizer=None):
        """Returns a visualizer that does nothing."""
        return _NoVisualizer()

    def load_or_resume(self) -> None:
        """Loads `resume_from`, if set, or `universal`, its conversion for a different number of ranks."""
        if self.resume_from is not None:
            client_state = self.strategy.resume(str(self.universal or self.resume_from))
            self.train_loop.seek(client_state["step"])
            self.random_state_folder = self.resume_from
            if self.universal is not None:
                distributed.barrier()
                if self.rank == 0:
                    remove_universal(self.resume_from.parent)

    def dump_config(self) -> None:
        """Does nothing: `open_run_folder` copies the original config into the run folder."""
