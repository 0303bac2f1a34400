"""Measures each optimizer step and writes the metrics."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from torch import distributed

from snaketune.common.files import read_json, write_json
from snaketune.common.result_paths import ATTEMPTS, METRICS
from snaketune.models.attention_shapes import UnknownShape
from snaketune.models.flops import ModelFlops, model_flops, peak_tflops
from snaketune.training.early_stop import STARTED
from snaketune.training.launch import core_seconds
from snaketune.training.progress_line import ProgressLine
from snaketune.training.trackers import check_loggers, start_loggers

_COST_EVERY = 10.0  # seconds between updates of an attempt's cost: a kill loses no more than that
# Fields that may differ between runs that compute the same results.
MEASURED = frozenset(
    [
        "attempt",
        "world_size",
        "sequence_parallel",
        "seconds",
        "tokens_per_second",
        "tokens_per_second_per_device",
        "data_share",
        "tflops_per_device",
        "mfu",
        "gpu_memory_mib",
        "cpu_memory_mib",
        "eta_seconds",
    ]
)


class MetricsHook(Hook):
    """Writes each step to metrics.jsonl, TensorBoard, the configured trackers, and a progress line.

    Fields of a line:
        step: Optimizer steps done. `epoch` is the number of passes over the data. `attempt` counts the starts
            of the run; this one has `world_size` ranks, of which `sequence_parallel` share each packed
            sequence.
        loss: Loss of the step over all ranks, in nats per trained token; null if not finite. `skipped` is
            true if the step changed no weights.
        aux_loss: Of a mixture of experts, the router's auxiliary loss without its coefficient, if it is added.
        expert_load: Of a mixture of experts, for each of its layers, the load of the expert with the fewest tokens and
            of that with the most (1 is an even share), and the entropy of the shares (1 is even). `expert_load_min`
            and `expert_load_max` are the extremes over the layers, `expert_load_entropy` is their mean.
        lr, grad_norm: Learning rate used in this step; L2 norm of the gradient before clipping.
        tokens, trained_tokens, trained_share: Totals over all ranks, and the share of tokens that are trained
            on.
        seconds: Duration of the step, including waiting for data but not saving or evaluating.
        data_share: Share of `seconds` spent waiting for data, averaged over the ranks.
        tokens_per_second, tokens_per_second_per_device: Each rank counts as a device: a GPU, or a process on
            CPUs.
        tflops_per_device: FLOP of the model per second and device, in 10^12, see `snaketune.models.flops`.
        mfu: `tflops_per_device` as a share of the device's peak; null if the peak is unknown. Both are null
            for a model whose arithmetic is not known; the log says why.
        gpu_memory_mib, cpu_memory_mib: Peak so far, on the rank with the highest.
        eta_seconds: Estimated time left, from the last 20 steps.

    Args:
        interval: Steps between progress lines in a log. The files and a terminal get every step.
        loggers: Trackers: `wandb`, `mlflow`.
        peak_tflops: Peak of a device, in 10^12 FLOP/s; None looks it up in
            `snaketune.models.flops.PEAK_TFLOPS`.
    """

    priority = "BELOW_NORMAL"  # before the schedulers change lr, and before the checkpoint is written

    def __init__(self, interval: int = 1, loggers: Sequence[str] = (), peak_tflops: float | None = None):
        check_loggers(loggers)
        self.interval, self.loggers, self.peak_tflops = interval, loggers, peak_tflops
        self.recent: deque[float] = deque(maxlen=20)

    def before_train(self, runner) -> None:
        """Opens the files. `train_rank` has already cut metrics.jsonl back to the step to resume from."""
        model = runner.model.model.module.llm
        self.flops = _flops(model)
        if self.peak_tflops is None and torch.cuda.is_available():
            self.peak_tflops = peak_tflops(torch.cuda.get_device_name(), model.dtype)
        taken = torch.tensor(core_seconds(), dtype=torch.float64, device=runner.model.model.device)
        distributed.all_reduce(taken)
        if not is_main_process():
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(runner.work_dir)
        self.attempt = _count_attempt(folder)
        self.core_seconds = taken.item()
        self._note_cost(folder, runner.world_size)
        self.file = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=runner.iter + 1)
        self.trackers = start_loggers(self.loggers, folder)
        first = "from the start" if runner.iter == 0 else f"resuming after step {runner.iter}"
        print(f"Training {runner.max_iters} steps, {first} (attempt {self.attempt})", flush=True)
        self.line = ProgressLine(runner.iter, runner.max_iters, self.interval)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Aggregates the step's metrics over the ranks and writes them."""
        seconds = time.perf_counter() - outputs["started"]
        device = outputs["loss"].device
        own = [outputs["tokens"], outputs["trained_tokens"], outputs.get("data_seconds", 0.0)]
        lengths, trained = outputs["document_lengths"], outputs["trained_tokens"]
        own.append(self.flops.step(lengths, trained) if self.flops else 0.0)
        own.append(core_seconds())
        load = runner.model.model.module.expert_load
        counts = load.take(device) if load.layers else torch.empty(0, device=device)
        sums = torch.cat(
            [torch.tensor([0.0, 0.0, *own], dtype=torch.float64, device=device), counts.double()]
        )
        sums[0] = outputs["loss"]
        if outputs["aux_loss"] is not None:
            sums[1] = outputs["aux_loss"]
        gpu = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
        peaks = torch.tensor([gpu, _peak_memory_mib()], dtype=torch.float64, device=device)
        distributed.all_reduce(sums)
        distributed.all_reduce(peaks, op=distributed.ReduceOp.MAX)
        norm = runner.model.get_global_grad_norm()  # all ranks compute it together
        if not is_main_process():
            return
        loss, aux_loss, tokens, trained, waited, flops, self.core_seconds = sums[:7].tolist()
        gpu, cpu = peaks.tolist()
        ranks, step = runner.world_size, batch_idx + 1
        self.recent.append(seconds)
        tflops = flops / ranks / seconds / 1e12 if self.flops else None
        values = {
            "loss": _finite(loss),
            **({} if outputs["aux_loss"] is None else {"aux_loss": _finite(aux_loss)}),
            "lr": runner.optim_wrapper.param_groups[0]["lr"],
            "grad_norm": None if norm is None else _finite(float(norm)),
            "trained_share": round(trained / tokens, 6),
            "tokens_per_second": round(tokens / seconds, 1),
            "tokens_per_second_per_device": round(tokens / seconds / ranks, 1),
            "tflops_per_device": float(f"{tflops:.4g}") if self.flops else None,
            "mfu": round(tflops / self.peak_tflops, 4) if self.flops and self.peak_tflops else None,
            "data_share": round(waited / ranks / seconds, 5),
            "seconds": round(seconds, 4),
            **({"gpu_memory_mib": round(gpu)} if device.type == "cuda" else {}),
            "cpu_memory_mib": round(cpu),
            "eta_seconds": round(sum(self.recent) / len(self.recent) * (runner.max_iters - step), 1),
        }
        layers = load.describe(sums[7:]) if load.layers else []
        values |= _loads(layers)
        totals = {"tokens": int(tokens), "trained_tokens": int(trained)}
        if outputs.get("skipped"):
            totals["skipped"] = True
        epoch = round(step / runner.train_loop.steps_per_epoch, 6)
        start = {"attempt": self.attempt, "world_size": ranks}
        start["sequence_parallel"] = runner.strategy.sequence_parallel.size
        line = {"step": step, "epoch": epoch, **start, **values, **totals}
        if layers:
            line["expert_load"] = [[round(each, 4) for each in layer] for layer in layers]
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if time.monotonic() - self.noted > _COST_EVERY:
            self._note_cost(Path(runner.work_dir), ranks)
        self.record(step, {f"train/{name}": value for name, value in values.items()})
        self.line.show(step, _describe(values), values["eta_seconds"])

    def _note_cost(self, folder: Path, ranks: int) -> None:
        """Records the cost of this attempt since its job began. If it is killed, the last record counts."""
        self.noted = time.monotonic()
        values = read_json(folder / ATTEMPTS)
        seconds = time.time() - float(os.environ.get(STARTED, time.time()))
        cost = {"seconds": round(seconds, 1), "core_seconds": round(self.core_seconds, 1), "ranks": ranks}
        values.setdefault("costs", {})[str(self.attempt)] = cost
        write_json(folder / ATTEMPTS, values)

    def record(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes values to TensorBoard and the trackers, except None. Called on rank 0."""
        known = {name: value for name, value in values.items() if value is not None}
        for name, value in known.items():
            self.board.add_scalar(name, value, step)
        for tracker in self.trackers:
            tracker.log(step, known)

    def after_train(self, runner) -> None:
        """Closes the files."""
        if is_main_process():
            self._note_cost(Path(runner.work_dir), runner.world_size)
            self.line.close()
            self.file.close()
            self.board.close()
            for tracker in self.trackers:
                tracker.close()


def _describe(values: Mapping[str, float | None]) -> str:
    loss, norm = ("-" if values[name] is None else values[name] for name in ("loss", "grad_norm"))
    rate, each = values["tokens_per_second"], values["tokens_per_second_per_device"]
    memory = values.get("gpu_memory_mib", values["cpu_memory_mib"]) / 1024
    parts = [
        f"loss {loss if loss == '-' else format(loss, '.4f')}",
        f"aux_loss {values['aux_loss']:.4f}" if values.get("aux_loss") is not None else "",
        f"lr {values['lr']:.3e}",
        f"grad_norm {norm if norm == '-' else format(norm, '.3f')}",
        f"trained {values['trained_share']:.0%}",
        f"{rate:,.0f} tok/s" + (f" ({each:,.0f} per device)" if each != rate else ""),
        _describe_speed(values["tflops_per_device"], values["mfu"]),
        f"data {values['data_share']:.1%}",
        f"{memory:.1f} GiB",
    ]
    return "  ".join(part for part in parts if part)


def _loads(layers: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    if not layers:
        return {}
    least, most, entropies = zip(*layers, strict=True)
    return {
        "expert_load_min": round(min(least), 4),
        "expert_load_max": round(max(most), 4),
        "expert_load_entropy": round(sum(entropies) / len(entropies), 4),
    }


def _describe_speed(tflops: float | None, mfu: float | None) -> str:
    if tflops is None:
        return ""
    return f"{tflops:.3g} TFLOP/s" if mfu is None else f"MFU {mfu:.1%}"


def _flops(model) -> ModelFlops | None:
    """Returns the FLOPs of a model; None if they are not known. A metric never ends a training."""
    try:
        return model_flops(model)
    except Exception as error:  # the config of an architecture that we do not know may raise anything
        reason = str(error) if isinstance(error, UnknownShape) else f"{type(error).__name__}: {error}"
        if is_main_process():
            print(f"No TFLOP/s and MFU for {type(model).__name__}: {reason}", flush=True)
        return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _peak_memory_mib() -> float:
    """Returns the peak resident memory of this process (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _count_attempt(folder: Path) -> int:
    path = folder / ATTEMPTS
    before = read_json(path) if path.is_file() else {"attempts": 0}
    job = os.environ.get("SLURM_JOB_ID")
    jobs = before.get("slurm_job_ids", []) + ([job] if job else [])
    values = before | {"attempts": before["attempts"] + 1} | ({"slurm_job_ids": jobs} if jobs else {})
    write_json(path, values)
    return values["attempts"]
