"""Attention within the documents of a packed sequence, at the cost of the documents alone.

A packed sequence has several documents end to end. Stock sdpa would need a dense (length x length) mask for it, which
costs more than the model itself at 32,768 tokens. Here each document gets a separate causal
`scaled_dot_product_attention`. This needs no mask and costs the sum of the squared document lengths.

The model decides what a token sees: `document_mask` reads sliding windows and chunks from the mask that the model asks
transformers for, and evaluates any other mask block by block. Sinks and capped scores are computed too.

Registered with transformers as `packed`; `resolve_attention` chooses it. transformers refuses names with "sdpa" for
models that it never tried with sdpa, such as gpt-oss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from snaketune.common.cli import UserError

PACKED = "packed"
_BLOCK = 512  # queries per block, where a mask or scores have to be materialised
# The forward arguments that give attention the boundaries of packed documents.
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Arguments of transformers' attention calls that do not change the result of a training forward pass.
_NO_EFFECT = {
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",
    "logits_to_keep",
    "return_dict",
}


def resolve_attention(name: str, device: str) -> str:
    """Returns transformers' name for a config's `attention`.

    Args:
        name: `auto`, `sdpa` (both process one document at a time on a CPU) or any name that transformers knows.
        device: `cpu` or `cuda`.
    """
    if name == "auto":
        from transformers.utils import is_flash_attn_2_available

        name = "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"
    return PACKED if name == "sdpa" else name


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
    if len(cumulative_len) == 2:
        return {}  # one document needs no boundaries, and some models refuse any
    boundaries = cumulative_len.to(torch.int32)
    if longest is None:
        longest = int((boundaries[1:] - boundaries[:-1]).max())
    return dict(zip(PACKING_ARGUMENTS, (boundaries, boundaries, longest, longest), strict=True))


def document_boundaries(position_ids: torch.Tensor) -> list[int]:
    """Returns the boundaries in a packed sequence, [0, ..., length], from its position ids (1, length)."""
    starts = (position_ids[0, 1:] != position_ids[0, :-1] + 1).nonzero().flatten() + 1
    return [0, *starts.tolist(), position_ids.shape[1]]


@dataclass(frozen=True)
class DocumentMask:
    """The tokens that a token of a document sees, besides the rule that it sees only its document.

    Attributes:
        window: Most keys per query, including its own position; None if there is no limit.
        chunk: A document is cut every `chunk` tokens, and tokens see only their piece; None if it is not cut.
        function: A mask function of transformers, (batch, head, query, key) -> bool over positions in the packed
            sequence. If given, it alone decides. None means causal, within window and chunk.
    """

    window: int | None = None
    chunk: int | None = None
    function: Callable | None = None


def document_mask(function: Callable) -> DocumentMask:
    """Returns the mask of a document for a mask function of transformers.

    Recognises the functions that transformers builds from causal, sliding and chunked parts. Others are kept as they
    are, to be evaluated.
    """
    parts = _parts(function)
    if parts is None or parts.get("causal") is None:
        return DocumentMask(function=function)
    return DocumentMask(parts.get("window"), parts.get("chunk"))


def _parts(function: Callable) -> dict[str, int] | None:
    """Returns {"causal": 1, "window": tokens, "chunk": tokens} as far as present; None for any other function."""
    if function is causal_mask_function:
        return {"causal": 1}
    kind = function.__qualname__.partition(".<locals>")[0]
    values = inspect.getclosurevars(function).nonlocals
    if kind == "and_masks":
        found: dict[str, int] = {}
        for each in values["mask_functions"]:
            part = _parts(each)
            if part is None or found.keys() & part.keys():
                return None
            found |= part
        return found
    if kind == "remap_positions_for_packed_sequence":
        return _parts(values["mask_function"])
    if kind == "packed_sequence_mask_function":
        return {}
    if kind == "sliding_window_overlay":
        return {"window": values["sliding_window"]}
    if kind == "chunked_overlay":
        return {"chunk": values["chunk_size"]}
    return None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | DocumentMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Computes attention within each document of a packed sequence.

    Args:
        query: (batch, heads, tokens, head_dim); `key` and `value` may have fewer heads.
        attention_mask: What `_packed_mask` returned. A tensor belongs to a padded batch or a cache; then tokens are
            not packed. None is causal attention.
        sliding_window: Most keys per query, including its own position; read only if there is no mask.
        softcap: Scores become softcap x tanh(score / softcap).
        s_aux: (heads,), the score of an extra key without a value, the sink.
        cu_seq_lens_q: int32 (documents + 1,), the boundaries; None derives them from `position_ids`.

    Returns:
        ((batch, tokens, heads, head_dim), None), as transformers expects.

    Raises:
        TypeError: The model passes an argument that this function does not know.
    """
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _NO_EFFECT)
    if unknown:
        raise TypeError(f"packed attention does not support the argument {', '.join(unknown)}")
    tokens = query.shape[2]
    compute = _Attention(
        scaling=scaling if scaling is not None else query.shape[-1] ** -0.5,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
        gqa=query.shape[1] != key.shape[1],
    )
    if isinstance(attention_mask, torch.Tensor) or query.shape[0] != 1 or key.shape[2] != tokens:
        if softcap is None and s_aux is None:
            options = {} if is_causal is None else {"is_causal": is_causal}
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
            )
        if attention_mask is None and tokens > 1 and is_causal is not False:
            attention_mask = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=query.device)
            attention_mask = attention_mask.tril(key.shape[2] - tokens)[None, None]
        return compute(query, key, value, attention_mask).transpose(1, 2).contiguous(), None
    if is_causal is False and attention_mask is None:
        raise TypeError("packed attention does not support is_causal=False without a mask")
    mask = attention_mask or DocumentMask(window=sliding_window)
    if cu_seq_lens_q is not None:
        boundaries = cu_seq_lens_q.tolist()
    elif position_ids is not None and position_ids.shape[-1] == tokens:
        boundaries = document_boundaries(position_ids)
    else:
        boundaries = [0, tokens]
    if mask.chunk is not None:
        boundaries = _cut(boundaries, mask.chunk)
    pieces = []
    for start, stop in zip(boundaries[:-1], boundaries[1:], strict=True):
        document = [part[:, :, start:stop] for part in (query, key, value)]
        pieces.append(compute.document(*document, mask, start))
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _cut(boundaries: list[int], chunk: int) -> list[int]:
    pairs = zip(boundaries[:-1], boundaries[1:], strict=True)
    return [*(cut for start, stop in pairs for cut in range(start, stop, chunk)), boundaries[-1]]


@dataclass(frozen=True)
class _Attention:
    """The arithmetic of one attention layer, apart from its mask; see `packed_attention`."""

    scaling: float
    dropout: float
    softcap: float | None
    sinks: torch.Tensor | None
    gqa: bool

    def document(self, query, key, value, mask: DocumentMask, start: int) -> torch.Tensor:
        """Attends within a document that begins at position `start`: (1, heads, length, value_dim)."""
        length = query.shape[2]
        windowed = mask.window is not None and length > mask.window
        if mask.function is None and not windowed and self.softcap is None:
            return self._causal(query, key, value)
        block = max(mask.window, 1) if windowed and mask.function is None else _BLOCK
        pieces = []
        for begin in range(0, length, block):
            end = min(begin + block, length)
            first = max(0, begin - mask.window + 1) if windowed and mask.function is None else 0
            # A mask of the model's own may look ahead.
            last = length if mask.function is not None else end
            visible = _visible(mask, start, (begin, end), (first, last), query.device)
            inputs = (query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last], visible)
            if self.softcap is not None and torch.is_grad_enabled():
                # The backward pass would keep the scores of all blocks.
                pieces.append(checkpoint(self.__call__, *inputs, use_reentrant=False))
            else:
                pieces.append(self(*inputs))
        return torch.cat(pieces, dim=2)

    def __call__(self, query, key, value, visible: torch.Tensor | None) -> torch.Tensor:
        """Attends with a mask that broadcasts to (batch, heads, queries, keys); bool, or added to the scores."""
        if self.softcap is not None:
            return self._capped(query, key, value, visible)
        if self.sinks is not None:
            size = value.shape[-1]
            query, key, value = self._with_sink(query, key, value)
            if visible is not None:
                visible = pad(visible, (1, 0), value=True if visible.dtype == torch.bool else 0.0)
            return self._sdpa(query, key, value, attn_mask=visible)[..., :size]
        return self._sdpa(query, key, value, attn_mask=visible)

    def _causal(self, query, key, value) -> torch.Tensor:
        if self.sinks is None:
            return self._sdpa(query, key, value, is_causal=True)
        size = value.shape[-1]
        query, key, value = self._with_sink(query, key, value)
        # A first query pairs with the sink, so that the mask stays causal and needs no memory.
        return self._sdpa(pad(query, (0, 0, 1, 0)), key, value, is_causal=True)[:, :, 1:, :size]

    def _with_sink(self, query, key, value) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds the sink as the first key: its score with each query is `sinks`, its value is zero.

        Queries carry the score in an extra dimension, in which only the sink's key is not zero. So heads that share a
        key can have different sinks. Sizes stay multiples of 8, which kernels need.
        """
        batch, heads, queries, size = query.shape
        score = (self.sinks / self.scaling).to(query.dtype).view(1, heads, 1, 1)
        query = torch.cat([query, pad(score.expand(batch, heads, queries, 1), (0, 7))], dim=-1)
        one = torch.zeros(1, 1, 1, size + 8, dtype=key.dtype, device=key.device)
        one[..., size] = 1.0
        key = torch.cat([one.expand(batch, key.shape[1], 1, -1), pad(key, (0, 8))], dim=2)
        return query, key, pad(value, (0, size + 8 - value.shape[-1], 1, 0))

    def _sdpa(self, query, key, value, **mask) -> torch.Tensor:
        return scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout, scale=self.scaling, enable_gqa=self.gqa, **mask
        )

    def _capped(self, query, key, value, visible: torch.Tensor | None) -> torch.Tensor:
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * self.scaling
        scores = torch.tanh(scores / self.softcap) * self.softcap
        if visible is not None:
            hides = visible.dtype == torch.bool
            scores = (
                scores.masked_fill(~visible, torch.finfo(scores.dtype).min) if hides else scores + visible
            )
        if self.sinks is not None:
            sink = self.sinks.view(1, -1, 1, 1).to(scores).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], dim=-1)
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        shares = torch.nn.functional.dropout(shares, p=self.dropout, training=self.dropout > 0)
        return shares[..., : key.shape[2]] @ value


def _visible(
    mask: DocumentMask, start: int, queries: tuple[int, int], keys: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Returns a bool mask (1, 1, queries, keys) for ranges of a document's positions."""
    rows = torch.arange(*queries, device=device)[:, None]
    columns = torch.arange(*keys, device=device)[None]
    if mask.function is not None:
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
        visible = mask.function(zero, zero, (rows + start)[None, None], (columns + start)[None, None])
        return visible.expand(1, 1, rows.shape[0], columns.shape[1])
    distance = rows - columns
    visible = distance >= 0
    if mask.window is not None:
        visible = visible & (distance < mask.window)
    return visible[None, None]


def _packed_mask(batch_size, q_length, kv_length, mask_function, attention_mask=None, **kwargs):
    """Returns None or a `DocumentMask` for a packed sequence seen from its start, else stock sdpa's mask."""
    if batch_size == 1 and q_length == kv_length and (attention_mask is None or bool(attention_mask.all())):
        mask = document_mask(mask_function)
        return None if mask == DocumentMask() else mask
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _packed_mask)
