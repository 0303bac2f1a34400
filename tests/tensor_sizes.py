"""Watches the size of every tensor that PyTorch makes, forward and backward."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorSizes(TorchDispatchMode):
    """Within this context `largest` holds the most elements that a new tensor had, and `shape` its shape.

    Views are not new. What a kernel allocates for itself alone is not seen; the kernels' names are in `operators`.
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
