"""One tensor at a time out of a Hugging Face folder, whichever of its safetensors files holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from common.cli import UserError


class SafetensorsFolder(Mapping[str, torch.Tensor]):
    """The tensors of all `*.safetensors` files of a folder, read when asked for.

    Raises:
        UserError: The folder holds none.
    """

    def __init__(self, folder: Path):
        self._files = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, "pt")
            self._files |= dict.fromkeys(file.keys(), file)
        if not self._files:
            raise UserError(f"{folder} holds no safetensors", expected="*.safetensors")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
