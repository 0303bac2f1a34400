"""Checks that the documents of a packed sequence do not affect each other in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from snaketune.models.packed_attention import packing_kwargs

LENGTHS = (45, 61, 38)  # of the documents of a test row, in tokens; more than any convolution is wide
# Largest allowed difference, relative to the standard deviation of the logits, between a document in a packed sequence
# and alone. Right models stay below 1e-5 in fp32, and wrong twins are above 0.1 (docs/models.md).
BOUND = 1e-3
# The same for the change when another document changes. Shapes stay equal, so only a router's groups can round
# differently; in 16 bits that is visible.
LEAK_32, LEAK_16 = 3e-5, 0.1
_FIRST_ID = 3  # 0 to 2 are often special


@dataclass(frozen=True)
class Row:
    """A packed sequence of random tokens.

    Attributes:
        ids: int64 (1, tokens).
        boundaries: Boundaries of the documents, [0, ..., tokens].
    """

    ids: torch.Tensor
    boundaries: list[int]

    def inputs(self, device: torch.device | str = "cpu") -> dict:
        """Returns the arguments of a model's forward pass, as training passes them."""
        sizes = [stop - start for start, stop in zip(self.boundaries[:-1], self.boundaries[1:], strict=True)]
        positions = torch.cat([torch.arange(size) for size in sizes])[None]
        return {
            "input_ids": self.ids.to(device),
            "position_ids": positions.to(device),
            "use_cache": False,
            **packing_kwargs(torch.tensor(self.boundaries, device=device), max(sizes)),
        }

    def documents(self) -> list[Row]:
        """Returns each document as a row of its own."""
        return [
            Row(self.ids[:, start:stop], [0, stop - start])
            for start, stop in zip(self.boundaries[:-1], self.boundaries[1:], strict=True)
        ]

    def with_other_document(self, number: int) -> Row:
        """Returns the row with all tokens of one document changed."""
        start, stop = self.boundaries[number : number + 2]
        ids = self.ids.clone()
        ids[:, start:stop] = ids[:, start:stop].flip(1).roll(1) ^ 1
        return Row(ids, self.boundaries)


def random_row(vocabulary: int, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> Row:
    """Returns documents of random ids below `vocabulary`."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    generator = torch.Generator().manual_seed(seed)
    last = max(min(vocabulary, 1 << 14) - 2, _FIRST_ID + 2)
    ids = torch.randint(_FIRST_ID, last, (1, ends[-1]), generator=generator)
    return Row(ids, [0, *ends])


def logits_of(model: PreTrainedModel, row: Row) -> torch.Tensor:
    """Returns fp32 logits (tokens, vocabulary) on the model's device."""
    device = next(model.parameters()).device
    return model(**row.inputs(device)).logits[0].float()


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference of two tensors, in standard deviations of the expected one."""
    return ((found - expected).abs().max() / expected.std()).item()


def main_output(output: Any) -> torch.Tensor:
    """Returns the hidden states from what a part of a model returns."""
    return output[0] if isinstance(output, tuple | list) else output


@torch.no_grad()
def leak(model: PreTrainedModel, row: Row) -> float:
    """Returns how much the logits of other documents move when one changes, relative to their standard deviation.

    Changes the first document and the last, one at a time.
    """
    before = logits_of(model, row)
    spread = before.std()
    moved = []
    last = len(row.boundaries) - 2
    for number in (0, last):
        difference = (logits_of(model, row.with_other_document(number)) - before).abs().amax(dim=1)
        start, stop = row.boundaries[number : number + 2]
        others = torch.ones(len(difference), dtype=torch.bool, device=difference.device)
        others[start:stop] = False
        moved.append((difference[others].max() / spread).item())
    return max(moved)
