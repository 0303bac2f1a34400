"""Gives the masks of `eager` and `flex_attention` the boundaries of packed documents.

transformers finds the documents of a packed sequence by their position ids, but some models make their masks without
them; then documents see each other. Here the boundaries that `note_documents` notes are added to each mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    packed_sequence_mask_function,
)

from snaketune.models.documents import current_boundaries

WITH_MASKS = ("eager", "flex_attention")


def _within_documents(stock: Callable) -> Callable:
    """Wraps a mask function of transformers' interface."""

    def mask(batch_size, q_length, kv_length, *args, mask_function, **kwargs):
        boundaries = current_boundaries()
        if boundaries is not None and batch_size == 1 and q_length == kv_length == boundaries[-1]:
            documents = _document_numbers(boundaries).to(kwargs.get("device", "cpu"))
            mask_function = and_masks(packed_sequence_mask_function(documents), mask_function)
            kwargs["allow_is_causal_skip"] = False
        return stock(batch_size, q_length, kv_length, *args, mask_function=mask_function, **kwargs)

    return mask


def _document_numbers(boundaries: list[int]) -> torch.Tensor:
    """Returns the number of each token's document, int64 (1, tokens)."""
    sizes = torch.tensor(boundaries).diff()
    return torch.arange(len(sizes)).repeat_interleave(sizes)[None]


for _name in WITH_MASKS:
    AttentionMaskInterface.register(_name, _within_documents(ALL_MASK_ATTENTION_FUNCTIONS[_name]))
