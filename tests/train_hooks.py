"""Hooks that the training tests put into a config's custom_hooks: they look into a run from within."""

from __future__ import annotations

import os
import signal

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


class KillRank(Hook):
    """Kills rank R with SIGKILL in the middle of step N, when $TEST_KILL is "N:R"."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        step, _, rank = os.environ.get("TEST_KILL", "").partition(":")
        if step and batch_idx + 1 == int(step) and runner.rank == int(rank):
            os.kill(os.getpid(), signal.SIGKILL)
