"""One tensor at a time out of a Hugging Face folder, whichever of its safetensors files holds it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from common.cli import UserError


class SafetensorsFolder:
    """The tensors of all `*.safetensors` files of a folder, read when asked for.

    Raises:
        UserError: The folder holds none.
    """

    def __init__(self, folder: Path):
        self._files = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, "pt")
            self._files |= {name: file for name in file.keys()}  # noqa: SIM118 (a safetensors handle is no mapping)
        if not self._files:
            raise UserError(f"{folder} holds no safetensors", expected="*.safetensors")

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor as it was saved."""
        return self._files[name].get_tensor(name)
