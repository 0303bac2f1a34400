"""Pauses a trainer after each optimizer step, reports the step to train_throughput.py and waits for it.

The parent passes two pipes as file descriptors in $GATE_READ and $GATE_WRITE.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from mmengine.hooks import Hook


class Gate:
    """The trainer's side of the pipes. Call `ready` before the first step and `passed` after each step."""

    def __init__(self):
        self._read = os.fdopen(int(os.environ["GATE_READ"]))
        self._write = os.fdopen(int(os.environ["GATE_WRITE"]), "w")
        self._released = self._used = 0.0

    def ready(self) -> None:
        """Reports that the trainer is built, and waits."""
        self._say({"ready": True})

    def passed(self, tokens: int, loss: float | None = None) -> None:
        """Reports a step and waits. A step's seconds start at its release and include fetching data."""
        seconds, used = time.perf_counter() - self._released, time.process_time() - self._used
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
        step = {"seconds": seconds, "cpu_seconds": used, "tokens": tokens, "loss": loss}
        self._say({**step, "peak_mib": int(peak.split()[1]) / 1024})

    def _say(self, message: dict) -> None:
        self._write.write(json.dumps(message) + "\n")
        self._write.flush()
        if self._read.readline() != "go\n":
            os._exit(0)  # the benchmark is over
        self._released, self._used = time.perf_counter(), time.process_time()


class GateHook(Hook):
    """The gate in our trainer. It runs after all other hooks, so their cost counts."""

    priority = "LOWEST"

    def before_train(self, runner) -> None:
        self.gate = Gate()
        self.gate.ready()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.gate.passed(outputs["tokens"], float(outputs["loss"]))
