"""Hooks that the training tests add to a config's custom_hooks to inspect or disturb a run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from mmengine.hooks import Hook


class DumpWeights(Hook):
    """Saves the parameters in memory after training, gathered by DeepSpeed, to $TEST_DUMP on rank 0."""

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
    """Appends the token ids and boundaries of each micro-batch, as the model sees them, to $TEST_BATCHES."""

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
    """Kills rank R with SIGKILL in the middle of step N, if $TEST_KILL is "N:R"."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        step, _, rank = os.environ.get("TEST_KILL", "").partition(":")
        if step and batch_idx + 1 == int(step) and runner.rank == int(rank):
            os.kill(os.getpid(), signal.SIGKILL)


class RaiseAt(Hook):
    """Raises an error on all ranks in step N, if $TEST_RAISE is "N"."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if os.environ.get("TEST_RAISE") == str(batch_idx + 1):
            raise RuntimeError("raised by the test")


class PoisonWeight(Hook):
    """Sets a weight of rank 1 to NaN before step A and restores it after step B, if $TEST_POISON is "A:B"."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        first, _, self.last = os.environ.get("TEST_POISON", "0:0").partition(":")
        if runner.rank == 1 and batch_idx + 1 == int(first):
            parameter = next(p for name, p in runner.model.model.module.named_parameters() if "norm" in name)
            # Between steps, ZeRO-3 keeps small parameters whole, and only this rank's share of the others.
            self.weight = (parameter if parameter.numel() else parameter.ds_tensor).data
            self.before = self.weight.clone()
            self.weight.fill_(float("nan"))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.rank == 1 and batch_idx + 1 == int(self.last):
            self.weight.copy_(self.before)


class Slow(Hook):
    """Slows down every step by $TEST_SLOW seconds."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        time.sleep(float(os.environ.get("TEST_SLOW", 0)))


class StandStill(Hook):
    """Waits before step N for the file F, at most ten minutes, if $TEST_STAND_STILL is "N:F".

    The test signals the run in the meantime. A test that kills it does not need to create the file.
    """

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        step, _, file = os.environ.get("TEST_STAND_STILL", "").partition(":")
        if step != str(batch_idx + 1):
            return
        end = time.monotonic() + 600
        while not os.path.exists(file) and time.monotonic() < end:
            time.sleep(0.05)


class Pace(Hook):
    """Paces training by `pace.json`, beside the run's folder of checkpoints, which is read in every step.

    hold_after: The last rank waits after this step, until the file changes or a signal arrives.
    step_seconds: Extra time for every step.
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
