"""Hooks that the training tests put into a config's custom_hooks: they look into a run from within."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from mmengine.hooks import Hook


class DumpWeights(Hook):
    """Saves the parameters as they are in memory after training, gathered by DeepSpeed, to $TEST_DUMP on rank 0."""

    def after_train(self, runner) -> None:
        if "TEST_DUMP" not in os.environ:
            return
        import deepspeed

        state = {}
        for name, parameter in runner.model.model.module.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                state[name.removeprefix("llm.")] = parameter.detach().clone()
        if runner.rank == 0:
            torch.save(state, os.environ["TEST_DUMP"])


class RecordBatches(Hook):
    """Appends the ids and document boundaries of each micro-batch, as the model is to see them, to $TEST_BATCHES."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if "TEST_BATCHES" not in os.environ:
            return
        seen = [
            {
                "step": batch_idx + 1,
                "rank": runner.rank,
                "micro_batch": number,
                "ids": batch["data"]["input_ids"][0].tolist(),
                "boundaries": batch["data"]["cumulative_len"].tolist(),
            }
            for number, batch in enumerate(data_batch)
        ]
        with open(f"{os.environ['TEST_BATCHES']}.{runner.rank}", "a") as file:
            file.writelines(json.dumps(each) + "\n" for each in seen)


class KillRank(Hook):
    """Kills rank R with SIGKILL in the middle of step N, when $TEST_KILL is "N:R"."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        step, _, rank = os.environ.get("TEST_KILL", "").partition(":")
        if step and batch_idx + 1 == int(step) and runner.rank == int(rank):
            os.kill(os.getpid(), signal.SIGKILL)


class RaiseAt(Hook):
    """Raises on all ranks in step N, when $TEST_RAISE is "N"."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if os.environ.get("TEST_RAISE") == str(batch_idx + 1):
            raise RuntimeError("raised by the test")


class PoisonWeight(Hook):
    """Makes a weight of rank 1 NaN before step A and puts it back after step B, when $TEST_POISON is "A:B"."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        first, _, self.last = os.environ.get("TEST_POISON", "0:0").partition(":")
        if runner.rank == 1 and batch_idx + 1 == int(first):
            parameter = next(p for name, p in runner.model.model.module.named_parameters() if "norm" in name)
            # ZeRO-3 keeps small parameters whole between steps, and this rank's share of the others.
            self.weight = (parameter if parameter.numel() else parameter.ds_tensor).data
            self.before = self.weight.clone()
            self.weight.fill_(float("nan"))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.rank == 1 and batch_idx + 1 == int(self.last):
            self.weight.copy_(self.before)


class Slow(Hook):
    """Makes every step $TEST_SLOW seconds longer."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        time.sleep(float(os.environ.get("TEST_SLOW", 0)))


class StandStill(Hook):
    """Waits before step N for the file F, when $TEST_STAND_STILL is "N:F"; ten minutes at most.

    A test signals the run meanwhile; one that kills it need not make the file.
    """

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        step, _, file = os.environ.get("TEST_STAND_STILL", "").partition(":")
        if step != str(batch_idx + 1):
            return
        end = time.monotonic() + 600
        while not os.path.exists(file) and time.monotonic() < end:
            time.sleep(0.05)


class Pace(Hook):
    """Trains as fast as `pace.json` says, which lies beside the run's folder of checkpoints and is read in every step.

    hold_after: The last rank waits before the step after this one, until the file says otherwise or a signal arrives.
    step_seconds: What every step takes longer.
    """

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        path = Path(runner.work_dir).parents[1] / "pace.json"
        while runner.rank == runner.world_size - 1 and runner.stop.signal is None:
            if batch_idx < _read_pace(path).get("hold_after", runner.max_iters):
                break
            time.sleep(0.05)
        time.sleep(_read_pace(path).get("step_seconds", 0))


def _read_pace(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}
