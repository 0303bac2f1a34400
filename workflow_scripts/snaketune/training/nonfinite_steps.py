"""Skips and counts steps whose loss or gradient is not finite, and ends the run after too many in a row.

DeepSpeed checks the norm of the summed gradient before it changes anything. So all ranks skip together, and
weights and optimizer stay unchanged. A skipped step still counts as a step: data and learning rate advance.
"""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import torch
from torch import distributed

from snaketune.common.cli import UserError
from snaketune.common.files import write_json


def spread_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """Returns the loss. If it is not finite, makes its gradient NaN.

    Every rank then sees the NaN in the summed gradient. An infinite loss does not always have a NaN gradient:
    for a token with probability 0 the gradient is finite.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def replace_zero_0_step(engine) -> None:
    """Makes the optimizer step of ZeRO-0 in fp32 clip by an fp64 norm and skip nonfinite gradients.

    DeepSpeed's other stages do this already. In ZeRO-0 it uses torch's fp32 norm, which on a CPU is 1.4% too
    low for 134 million numbers, does not report it, and does not skip steps with a nonfinite gradient.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "overflow"):
        return
    step, limit = optimizer.step, engine.gradient_clipping()
    engine.clip_fp32_gradients = lambda: None

    def clipped_step(*args, **kwargs):
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        # In blocks that fit in a CPU's cache: an fp64 copy of a whole embedding costs more than the norm.
        blocks = (block for gradient in gradients for block in gradient.flatten().split(1 << 18))
        norms = [torch.linalg.vector_norm(block, dtype=torch.float64) for block in blocks]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        # DeepSpeed reads these two attributes.
        optimizer._global_grad_norm, optimizer.overflow = norm, not math.isfinite(norm)
        if optimizer.overflow:
            return None
        if 0 < limit < norm:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        return step(*args, **kwargs)

    optimizer.step = clipped_step


def weights_are_finite(engine) -> bool:
    """True, on all ranks, if every weight is finite. All ranks call it together. Reads the weights once."""
    weights = [
        getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()
    ]  # ZeRO-3: this rank's share
    finite = torch.stack([torch.isfinite(weight).all() for weight in weights if weight.numel()]).all()
    verdict = finite.to(torch.int32)
    distributed.all_reduce(verdict, op=distributed.ReduceOp.MIN)
    return bool(verdict)


class SkippedSteps:
    """Counts consecutive skipped steps.

    Args:
        limit: Steps in a row that may be skipped; the next one ends the run.
    """

    def __init__(self, limit: int):
        self.limit, self.in_a_row = limit, 0

    def count(self, engine) -> bool:
        """Counts the last step. Returns True, on all ranks, if it was skipped for its loss or gradient.

        In fp16, DeepSpeed skips steps to find its loss scale. These are not counted; DeepSpeed itself ends
        the run if no scale works.
        """
        skipped = not engine.was_step_applied()
        self.in_a_row = self.in_a_row + 1 if skipped and not engine.fp16_enabled() else 0
        return skipped

    def check(self, loop, step: int, losses: list[torch.Tensor]) -> None:
        """Ends the run if too many steps in a row were skipped. All ranks call it together.

        Args:
            loop: The TrainLoop.
            step: Number of the last step, from 1.
            losses: Losses of this rank's micro-batches.

        Raises:
            UserError: Too many. `nonfinite_step_<step>.json` in the run folder has the data of the last step.
        """
        if self.in_a_row <= self.limit:
            return
        runner = loop.runner
        loop.sampler.seek((step - 1) * loop.accumulative_counts)
        rows = islice(loop.sampler, loop.accumulative_counts)
        mine = [
            {"row": row, "loss": str(float(loss)), "documents": _documents(loop.sampler.plan, row)}
            for row, loss in zip(rows, losses, strict=True)
        ]
        ranks: list = [None] * runner.world_size
        distributed.all_gather_object(ranks, mine)
        path = Path(runner.work_dir) / f"nonfinite_step_{step}.json"
        if runner.rank == 0:
            trace = {"step": step, "skipped_in_a_row": self.in_a_row}
            trace["ranks"] = [{"rank": rank, "micro_batches": rows} for rank, rows in enumerate(ranks)]
            write_json(path, trace)
        raise UserError(
            f"the loss or gradient was not finite in {self.in_a_row} steps in a row, up to step {step}",
            found=f"{path.name} in the run folder lists the losses, rows and documents of that step",
            expected=f"at most {self.limit} skipped steps in a row (max_skipped_steps)",
            fix="check the documents, lower lr or raise warmup_ratio; the last checkpoint predates these steps",
        )


def _documents(plan, row: int) -> list[dict]:
    return [
        {
            "file": plan.files[piece.file]["name"],
            "sample": piece.sample,
            "start": piece.start,
            "stop": piece.stop,
        }
        for piece in plan.row(row)
    ]
