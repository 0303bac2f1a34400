"""Computes a language model's cross entropy without holding all logits of a packed sequence in memory.

A sequence of 32,768 tokens with a vocabulary of 49,152 has 6 GiB of logits in fp32, and as much again for their
gradient. So the head runs on a few hundred tokens at a time. For a plain linear head this needs no extra arithmetic: a
chunk's gradients are computed while its logits are in memory, as in Liger's fused kernel. Other heads (such as a LoRA
layer) run a second time in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from snaketune.common.cli import UserError
from snaketune.models.device import training_device

CHUNK_ELEMENTS = 2**25  # logits in memory at a time: 128 MiB in fp32


def check_cross_entropy(name: str) -> None:
    """Checks that a config's `cross_entropy` works on this machine.

    Raises:
        UserError: The name is unknown, or Liger's kernel is not installed or has no GPU.
    """
    if name not in ("chunked", "liger"):
        raise UserError("invalid cross_entropy", found=name, expected="chunked or liger")
    if name == "liger" and (training_device() != "cuda" or find_spec("liger_kernel") is None):
        raise UserError(
            "cross_entropy = liger needs a GPU and the package liger-kernel",
            found=f"device {training_device()}, liger-kernel {'in' if find_spec('liger_kernel') else 'not in'}stalled",
            fix="set cross_entropy to chunked, or pip install liger-kernel on a GPU machine",
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """sum over i of cross_entropy(hidden[i] @ weight.T + bias, targets[i]). Computes gradients in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, wanted):
        total = hidden.new_zeros((), dtype=torch.float64)
        # fp32: a sum over many chunks in bfloat16 would lose most of its digits.
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] else None
        for part in _chunks(len(hidden), len(weight)):
            logits = linear(hidden[part], weight, bias).float()
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            target = targets[part, None]
            total += (normaliser - logits.gather(1, target)).sum(dtype=torch.float64)
            if not any(wanted):
                continue
            # The gradient of a token's loss with respect to its logits, softmax minus one-hot, in place to save a copy.
            grad = logits.sub_(normaliser).exp_()
            grad.scatter_add_(1, target, torch.full_like(normaliser, -1.0))
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is None:
                continue
            if hidden.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), hidden[part])
            else:
                grad_weight += grad.t() @ hidden[part]
        ctx.gradients = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the loss has already been back-propagated")
        scaled = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(16, CHUNK_ELEMENTS // vocabulary)
    return (slice(start, start + size) for start in range(0, rows, size))


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Returns the sum of the token losses with a linear head, a float64 scalar.

    Args:
        hidden: (tokens, hidden size), the head's input.
        weight: (vocabulary, hidden size), in hidden's dtype.
        bias: (vocabulary,) or None.
        targets: int64 (tokens,), each within the vocabulary.
    """
    wanted = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, wanted)


def chunked_cross_entropy(
    rows: torch.Tensor, targets: torch.Tensor, vocabulary: int, to_logits: Callable = lambda rows: rows
) -> torch.Tensor:
    """Returns the sum of the token losses for any head, a float64 scalar. Recomputes the logits in the backward pass.

    Args:
        rows: (tokens, anything), the input of `to_logits`; logits by default.
        targets: int64 (tokens,), each within the vocabulary.
        vocabulary: Vocabulary size, which determines the chunk size.
        to_logits: Maps rows to logits (tokens, vocabulary).
    """

    def chunk_loss(rows, targets):
        return cross_entropy(to_logits(rows).float(), targets, reduction="none").sum(dtype=torch.float64)

    total = rows.new_zeros((), dtype=torch.float64)
    for part in _chunks(len(rows), vocabulary):
        total = total + checkpoint(chunk_loss, rows[part], targets[part], use_reentrant=False)
    return total


class HeadLoss:
    """The loss that a model's head returned in place of logits; see `loss_in_head`."""

    result: torch.Tensor | None = None

    def read(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Returns the loss from the model's `logits`, or None if they are not the head's output.

        A model that scales or caps its logits returns a new tensor; one that slices them changes the shape. DeepSpeed's
        hooks wrap the tensor again at each module, but keep its memory.
        """
        same = (
            self.result is not None
            and logits.data_ptr() == self.result.data_ptr()
            and logits.shape == self.result.shape
            and logits.dtype == self.result.dtype
        )
        return logits[0, 0, 0] if same else None


@contextmanager
def loss_in_head(
    head: nn.Module, kept: torch.Tensor, targets: torch.Tensor, vocabulary: int, kernel: str = "chunked"
) -> Iterator[HeadLoss]:
    """Within the context, `head` returns the sum of token losses instead of logits: (1, 1, vocabulary + 1), all equal.

    The model still calls its head, so hooks on it work (ZeRO-3 gathers its weight in one).

    Args:
        head: The output embedding of a model.
        kept: int64 (tokens,): positions in the packed sequence whose predictions are trained.
        targets: int64 (tokens,): the tokens to predict there.
        vocabulary: Vocabulary size.
        kernel: `chunked` or `liger`.
    """
    own_forward, loss = head.forward, HeadLoss()

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden[0].index_select(0, kept)
        if type(head) is not nn.Linear:
            total = chunked_cross_entropy(rows, targets, vocabulary, own_forward)
        elif kernel == "liger":
            total = _liger(rows, head.weight, head.bias, targets)
        else:
            total = linear_cross_entropy(rows, head.weight, head.bias, targets)
        loss.result = total.expand(1, 1, vocabulary + 1)  # wider than logits, to detect slicing
        return loss.result

    head.forward = forward
    try:
        yield loss
    finally:
        del head.forward


def _liger(hidden, weight, bias, targets) -> torch.Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets, bias).double()
