"""Attention that never crosses the boundaries of packed documents, at the cost of the documents alone.

A packed row holds several documents end to end. Stock sdpa would need a dense (row x row) mask for that: at 32,768
tokens it costs more than the model itself. Here each document gets its own causal
`scaled_dot_product_attention`, so no mask is made and the cost is the sum of the documents' squares.

Registered with transformers under the name `packed_sdpa`; `resolve_attention` chooses it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from snaketune.common.cli import UserError

PACKED_SDPA = "packed_sdpa"


def resolve_attention(name: str, device: str) -> str:
    """Returns the name transformers knows for a config's `attention`.

    Args:
        name: `auto`, `sdpa` (both mean one document at a time on CPU) or any name transformers has.
        device: `cpu` or `cuda`.
    """
    if name == "auto":
        from transformers.utils import is_flash_attn_2_available

        name = "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"
    return PACKED_SDPA if name == "sdpa" else name


def check_attention(name: str, device: str) -> None:
    """Tells whether a model with this attention can be trained here.

    Raises:
        UserError: It has no backward pass on this device.
    """
    if name == "flex_attention" and device == "cpu":
        raise UserError(
            "flex_attention cannot train on a CPU",
            found="PyTorch has no backward pass for it there",
            expected="a GPU, or another attention",
            fix="set attention to auto",
        )


def packing_kwargs(cumulative_len: torch.Tensor, longest: int | None = None) -> dict:
    """Returns the forward arguments that tell every attention where the documents of a row begin and end.

    Args:
        cumulative_len: int tensor (documents + 1,), boundaries from 0 to the row's length.
        longest: Tokens of the longest document; None computes it (on a GPU that waits for the device).
    """
    boundaries = cumulative_len.to(torch.int32)
    if longest is None:
        longest = int((boundaries[1:] - boundaries[:-1]).max())
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def document_boundaries(position_ids: torch.Tensor) -> list[int]:
    """Returns the boundaries of the documents of one row, [0, ..., length], from its position ids (1, length)."""
    starts = (position_ids[0, 1:] != position_ids[0, :-1] + 1).nonzero().flatten() + 1
    return [0, *starts.tolist(), position_ids.shape[1]]


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a row.

    Args:
        query: (batch, heads, tokens, head_dim); `key` and `value` may have fewer heads.
        attention_mask: A mask that transformers made (padded batch, or a cache): then stock sdpa does the work.
        sliding_window: Keys that a query sees at most, itself included; None for all before it.
        cu_seq_lens_q: int32 (documents + 1,), the boundaries. Without it they come from `position_ids`.

    Returns:
        ((batch, tokens, heads, head_dim), None), as transformers wants it.
    """
    if kwargs.get("softcap") is not None:
        raise ValueError(
            "packed_sdpa cannot cap attention scores (softcap); set attention = 'eager' in the config"
        )
    tokens = query.shape[2]
    if attention_mask is not None or query.shape[0] != 1 or key.shape[2] != tokens:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if cu_seq_lens_q is not None:
        boundaries = cu_seq_lens_q.tolist()
    elif position_ids is not None and position_ids.shape[-1] == tokens:
        boundaries = document_boundaries(position_ids)
    else:
        boundaries = [0, tokens]
    gqa = query.shape[1] != key.shape[1]
    pieces = []
    for start, stop in zip(boundaries[:-1], boundaries[1:], strict=True):
        document = [part[:, :, start:stop] for part in (query, key, value)]
        if sliding_window is not None and stop - start > sliding_window:
            pieces.append(
                _windowed(*document, window=sliding_window, dropout=dropout, scale=scaling, gqa=gqa)
            )
        else:
            pieces.append(
                scaled_dot_product_attention(
                    *document, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=gqa
                )
            )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _windowed(query, key, value, *, window, dropout, scale, gqa) -> torch.Tensor:
    """Causal attention over the last `window` keys, block by block, so that no mask exceeds window x 2 window."""
    length, blocks = query.shape[2], []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        distance = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(
            first, stop, device=query.device
        )
        blocks.append(
            scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, first:stop],
                value[:, :, first:stop],
                attn_mask=(distance >= 0) & (distance < window),
                dropout_p=dropout,
                scale=scale,
                enable_gqa=gqa,
            )
        )
    return torch.cat(blocks, dim=2)


def _packed_mask(batch_size, q_length, kv_length, attention_mask=None, **kwargs):
    """No mask for one row attended from its start; stock sdpa's mask for padded batches and for a cache."""
    if batch_size == 1 and q_length == kv_length and (attention_mask is None or bool(attention_mask.all())):
        return None
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs
    )


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _packed_mask)
