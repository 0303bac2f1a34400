"""Identifies a model's weights by one SHA-256 over all tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch


class WeightsDigest:
    """Hashes tensors in the order of their names: `begin` once, then `update` until all elements are added."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Starts the next tensor."""
        self._digest.update(f"{name} {dtype} {list(shape)}\n".encode())

    def update(self, elements: torch.Tensor) -> None:
        """Adds elements of the tensor, in row-major order."""
        self._digest.update(elements.contiguous().reshape(-1).view(torch.uint8).numpy())

    def hexdigest(self) -> str:
        """Returns the digest of everything added so far."""
        return self._digest.hexdigest()


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Returns the SHA-256 of the weights: names, dtypes, shapes and bytes, in the order of the names."""
    digest = WeightsDigest()
    for name in sorted(state):
        tensor = state[name]
        digest.begin(name, tensor.dtype, tensor.shape)
        digest.update(tensor)
    return digest.hexdigest()
