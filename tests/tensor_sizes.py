"""Watches the size of every tensor that PyTorch creates, forward and backward."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorSizes(TorchDispatchMode):
    """Records the number of elements (`largest`) and `shape` of the largest new tensor in this context.

    Views do not count as new. Memory that a kernel allocates internally is not seen; `operators` has the
    names of all kernels.
    """

    def __init__(self):
        super().__init__()
        self.largest, self.shape, self.operators = 0, (), set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.operators.add(str(operator))
        known = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if tensor.numel() > self.largest and _memory(tensor) not in known:
                self.largest, self.shape = tensor.numel(), tuple(tensor.shape)
        return result


def _tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
