"""Watches the size of every tensor that PyTorch makes, forward and backward."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorSizes(TorchDispatchMode):
    """Within this context `largest` holds the most elements that the memory of one tensor had, `shape` its shape.

    A view counts as the memory it looks at, so an expanded tensor counts as small. What a kernel allocates for
    itself alone is not seen; the kernels' names are in `operators`.
    """

    def __init__(self):
        super().__init__()
        self.largest, self.shape, self.operators = 0, (), set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.operators.add(str(operator))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                if elements > self.largest:
                    self.largest, self.shape = elements, tuple(tensor.shape)
        return result
