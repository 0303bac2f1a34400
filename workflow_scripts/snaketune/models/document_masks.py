"""Gives the masks of `eager` and `flex_attention` the boundaries of packed documents.

transformers finds the documents of a packed sequence by their position ids, but some models make their masks without
them; then documents see each other. Here the boundaries are noted when the model is called, and added to each mask.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    packed_sequence_mask_function,
)

WITH_MASKS = ("eager", "flex_attention")
# The number of each token's document, int64 (1, tokens), while a model runs on a packed sequence.
_DOCUMENTS: ContextVar[torch.Tensor | None] = ContextVar("documents", default=None)


def note_documents(model: PreTrainedModel) -> None:
    """Makes a model's masks separate the documents of each packed sequence that it is called with."""
    model.register_forward_pre_hook(_note, with_kwargs=True)
    model.register_forward_hook(_forget, always_call=True)


def _note(model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
    boundaries = kwargs.get("cu_seq_lens_q")
    if boundaries is None:
        _DOCUMENTS.set(None)
        return
    inner = boundaries[1:-1].long()
    starts = torch.zeros(int(boundaries[-1]), dtype=torch.int64, device=boundaries.device)
    _DOCUMENTS.set(starts.index_add(0, inner, torch.ones_like(inner)).cumsum(0)[None])


def _forget(model: PreTrainedModel, args: tuple, output: object) -> None:
    _DOCUMENTS.set(None)


def _within_documents(stock: Callable) -> Callable:
    """Wraps a mask function of transformers' interface."""

    def mask(batch_size, q_length, kv_length, *args, mask_function, **kwargs):
        documents = _DOCUMENTS.get()
        if documents is not None and batch_size == 1 and q_length == kv_length == documents.shape[1]:
            mask_function = and_masks(packed_sequence_mask_function(documents), mask_function)
            kwargs["allow_is_causal_skip"] = False
        return stock(batch_size, q_length, kv_length, *args, mask_function=mask_function, **kwargs)

    return mask


for _name in WITH_MASKS:
    AttentionMaskInterface.register(_name, _within_documents(ALL_MASK_ATTENTION_FUNCTIONS[_name]))
