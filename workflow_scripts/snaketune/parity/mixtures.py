"""Presents a mixture's published tensors, one per expert, as the stacked ones of transformers 5."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from snaketune.export.turbomind_config import MIXTURES, expert_number
from snaketune.serving.lmdeploy_engines import architecture_of


class FusedExperts(Mapping[str, torch.Tensor]):
    """A mixture's tensors under the names of transformers 5, each created on access.

    `mlp.experts.gate_up_proj` is (experts, 2 x inner, hidden), gate first; `mlp.experts.down_proj` is
    (experts, hidden, inner).

    Args:
        weights: Tensors by their published names.
        config: The parsed config.json.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]):
        self._weights = weights
        self._mixture = MIXTURES[architecture_of(config)]
        self._experts = range(expert_number(config))
        block = re.escape(self._mixture.block)
        gate, _, down = map(re.escape, self._mixture.parts)
        fused = re.compile(rf"(.*\.){block}\.experts\.0\.({gate}|{down})\.weight")
        self._fused: dict[str, str] = {}
        self._single: dict[str, str] = {}
        for name in weights:
            if match := fused.fullmatch(name):
                part = "gate_up_proj" if match[2] == self._mixture.parts[0] else "down_proj"
                self._fused[f"{match[1]}mlp.experts.{part}"] = f"{match[1]}{self._mixture.block}.experts"
            elif ".experts." not in name:
                self._single[name.replace(f".{self._mixture.block}.", ".mlp.")] = name

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._fused:
            return self._weights[self._single[name]]
        gate, up, down = self._mixture.parts
        parts = (gate, up) if name.endswith("gate_up_proj") else (down,)
        prefix = self._fused[name]
        rows = [
            torch.cat([self._weights[f"{prefix}.{each}.{part}.weight"] for part in parts])
            for each in self._experts
        ]
        return torch.stack(rows)

    def __iter__(self) -> Iterator[str]:
        yield from self._single
        yield from self._fused

    def __len__(self) -> int:
        return len(self._single) + len(self._fused)
