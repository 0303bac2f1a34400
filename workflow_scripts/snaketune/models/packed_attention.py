"""Attention within the documents of a packed sequence, at the cost of the documents alone.

A packed sequence has several documents end to end. Stock sdpa would need a dense (length x length) mask for it, which
costs more than the model itself at 32,768 tokens. Here each document gets a separate causal
`scaled_dot_product_attention`. This needs no mask and costs the sum of the squared document lengths.

Registered with transformers as `packed_sdpa`; `resolve_attention` chooses it.
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
    """Returns transformers' name for a config's `attention`.

    Args:
        name: `auto`, `sdpa` (both process one document at a time on a CPU) or any name that transformers knows.
        device: `cpu` or `cuda`.
    """
    if name == "auto":
        from transformers.utils import is_flash_attn_2_available

        name = "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"
    return PACKED_SDPA if name == "sdpa" else name


def check_attention(name: str, device: str) -> None:
    """Checks that a model with this attention can be trained on this device.

    Raises:
        UserError: The attention has no backward pass on this device.
    """
    if name == "flex_attention" and device == "cpu":
        raise UserError(
            "flex_attention cannot train on a CPU",
            found="PyTorch has no backward pass for it on a CPU",
            expected="a GPU, or another attention",
            fix="set attention to auto",
        )


def packing_kwargs(cumulative_len: torch.Tensor, longest: int | None = None) -> dict:
    """Returns the forward arguments that give every attention the boundaries of packed documents.

    Args:
        cumulative_len: int tensor (documents + 1,), boundaries from 0 to the length of the packed sequence.
        longest: Tokens of the longest document; None computes it (which waits for a GPU).
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
    """Returns the boundaries in a packed sequence, [0, ..., length], from its position ids (1, length)."""
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
    """Computes causal attention within each document of a packed sequence.

    Args:
        query: (batch, heads, tokens, head_dim); `key` and `value` may have fewer heads.
        attention_mask: A mask from transformers (padded batch, or a cache); if given, uses stock sdpa.
        sliding_window: Most keys per query, including its own position; None if there is no limit.
        cu_seq_lens_q: int32 (documents + 1,), the boundaries; None derives them from `position_ids`.

    Returns:
        ((batch, tokens, heads, head_dim), None), as transformers expects.
    """
    if kwargs.get("softcap") is not None:
        raise ValueError(
            "packed_sdpa does not support softcap (capped attention scores); set attention = 'eager' in the config"
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
    """Computes causal attention over the last `window` keys, block by block. No mask exceeds window x 2 window."""
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
    """Returns None for one packed sequence attended from its start, else stock sdpa's mask (padded batch, cache)."""
    if batch_size == 1 and q_length == kv_length and (attention_mask is None or bool(attention_mask.all())):
        return None
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs
    )


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _packed_mask)
