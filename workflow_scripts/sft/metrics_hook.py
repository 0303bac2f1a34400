"""Metrics of the training loop, once per optimizer step."""

from __future__ import annotations

import json
import time
from collections import deque
from datetime import timedelta
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from torch import distributed

from common.files import read_json, write_bytes, write_json
from sft.session import METRICS

ATTEMPTS = "attempts.json"


class MetricsHook(Hook):
    """Writes one line a step to metrics.jsonl and TensorBoard, and a progress line with rate and ETA.

    Fields of a line: `step`; `epoch` (passes over the data); `loss` of the step, see `sft.finetune.step_loss_weights`; `lr` used in
    this step; `grad_norm` (L2, before clipping); `tokens` and `trained_tokens` of all ranks; `tokens_per_second` of
    all ranks; `seconds`, data loading included, saving not; `attempt`; `memory_mib` (peak of rank 0's GPU).

    Args:
        interval: Steps between progress lines; the files get every step.
    """

    priority = "BELOW_NORMAL"  # before the schedulers change lr, and before the checkpoint is written

    def __init__(self, interval: int = 1):
        self.interval = interval
        self.recent: deque[float] = deque(maxlen=20)

    def before_train(self, runner) -> None:
        """Cuts the file back to the step that training goes on from."""
        if not is_main_process():
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(runner.work_dir)
        self.attempt = _count_attempt(folder)
        cut_metrics(folder / METRICS, runner.iter)
        self.file = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=runner.iter + 1)
        first = "from the start" if runner.iter == 0 else f"after step {runner.iter}"
        print(f"Training {runner.max_iters} steps, {first} (attempt {self.attempt})", flush=True)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Sums the step over the ranks, writes it."""
        device = outputs["loss"].device
        sums = torch.tensor(
            [0.0, outputs["tokens"], outputs["trained_tokens"]], dtype=torch.float64, device=device
        )
        sums[0] = outputs["loss"]
        distributed.all_reduce(sums)
        if not is_main_process():
            return
        loss, tokens, trained = sums.tolist()
        seconds = time.perf_counter() - outputs["started"]
        self.recent.append(seconds)
        step = batch_idx + 1
        norm = runner.model.get_global_grad_norm()
        values = {
            "loss": loss,
            "lr": runner.optim_wrapper.param_groups[0]["lr"],
            "grad_norm": None if norm is None else float(norm),
            "tokens_per_second": round(tokens / seconds, 1),
            "seconds": round(seconds, 4),
        }
        if device.type == "cuda":
            values["memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
        counts = {"tokens": int(tokens), "trained_tokens": int(trained)}
        loop = runner.train_loop
        epoch = round(step / loop.steps_per_epoch, 6)
        self.file.write(
            json.dumps({"step": step, "epoch": epoch, "attempt": self.attempt, **values, **counts}) + "\n"
        )
        self.file.flush()
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(f"train/{name}", value, step)
        if step % self.interval == 0 or step in (1, runner.max_iters):
            self._print(step, runner.max_iters, values, trained / tokens)

    def _print(self, step: int, last: int, values: dict, trained_share: float) -> None:
        left = sum(self.recent) / len(self.recent) * (last - step)
        norm = "-" if values["grad_norm"] is None else f"{values['grad_norm']:.3f}"
        print(
            f"Step {step}/{last}  loss {values['loss']:.4f}  lr {values['lr']:.3e}  grad_norm {norm}  "
            f"trained {trained_share:.0%}  {values['tokens_per_second']:,.0f} tok/s  ETA {timedelta(seconds=round(left))}",
            flush=True,
        )

    def after_train(self, runner) -> None:
        """Closes the files."""
        if is_main_process():
            self.file.close()
            self.board.close()


def _count_attempt(folder: Path) -> int:
    path = folder / ATTEMPTS
    attempt = read_json(path)["attempts"] + 1 if path.is_file() else 1
    write_json(path, {"attempts": attempt})
    return attempt


def cut_metrics(path: Path, step: int) -> None:
    """Removes the lines of a metrics file that lie past `step`, and a last line that a kill tore."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError):
            break
        kept.append(line)
    write_bytes(path, b"".join(kept))
