"""Attention over packed sequences: its cost, and separation of documents, for every supported implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from snaketune.common.cli import UserError
from snaketune.models.packed_attention import PACKED, packing_kwargs
from snaketune.training.packed_data import packed_collate
from snaketune.training.supervised_finetune import SupervisedFinetune
from tensor_sizes import TensorSizes

pytestmark = pytest.mark.slow

TOKENS, DOCUMENTS = 8192, 16


def small_model(attention: str, window: int | None = None):
    """A random two-layer model; a Mistral if it has a window."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    torch.manual_seed(4)
    if window is None:
        model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=TOKENS))
    else:
        model = MistralForCausalLM(
            MistralConfig(**sizes, sliding_window=window, max_position_embeddings=TOKENS)
        )
    model.set_attn_implementation(attention)
    return model


def packed(lengths) -> dict:
    """A packed sequence of documents with these lengths; every second token is trained."""
    ids = np.random.RandomState(3).randint(3, 64, sum(lengths))
    labels = np.where(np.arange(len(ids)) % 2, ids, -100)
    positions = np.concatenate([np.arange(length) for length in lengths])
    boundaries = np.cumsum([0, *lengths])
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "cumulative_len": boundaries}


def sixteen_documents() -> dict:
    """8,192 tokens; documents of 32 to 992."""
    return packed([32 + 64 * number for number in range(DOCUMENTS)])


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("window", [None, 128])
def test_nothing_as_large_as_a_mask_is_made(checkpointing, window):
    row = sixteen_documents()
    assert len(row["input_ids"]) == TOKENS and len(row["cumulative_len"]) == DOCUMENTS + 1
    model = SupervisedFinetune(small_model(PACKED, window), gradient_checkpointing=checkpointing).train()
    with TensorSizes() as sizes:
        model(**packed_collate([row]))["loss"].backward()
    # The largest are those of the MLP and the chunk of logits: nothing grows with the square of the length.
    assert sizes.largest <= TOKENS * 64
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default" in sizes.operators
    assert "aten._scaled_dot_product_flash_attention_for_cpu_backward.default" in sizes.operators


def test_one_document_of_the_whole_row_makes_no_mask_either():
    model = SupervisedFinetune(small_model(PACKED)).train()
    with TensorSizes() as sizes:
        model(**packed_collate([packed([TOKENS])]))["loss"].backward()
    assert sizes.largest <= TOKENS * 64


def test_the_stock_way_would_be_seen():
    """Shows that the tests above can fail: transformers' own sdpa builds the full mask."""
    batch = packed_collate([sixteen_documents()])["data"]
    with torch.no_grad(), TensorSizes() as sizes:
        small_model("sdpa").model(
            input_ids=batch["input_ids"][:, :2048],
            position_ids=batch["position_ids"][:, :2048],
            use_cache=False,
        )
    assert sizes.largest >= 2048 * 2048


LENGTHS = (5, 1, 17, 9, 32)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("attention", [PACKED, "sdpa", "eager"])
def test_documents_do_not_see_each_other(attention, window, checkpointing):
    """Logits and gradients of a packed sequence equal those of its documents alone."""
    row = packed(LENGTHS)
    finetune = SupervisedFinetune(small_model(attention, window), gradient_checkpointing=checkpointing)
    compare_with_documents_alone(finetune.train().llm, row, window)


def compare_with_documents_alone(model, row: dict, window: int | None) -> None:
    batch = packed_collate([row])["data"]
    logits = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,
        **packing_kwargs(batch["cumulative_len"]),
    ).logits
    alone = small_model("eager", window).train()
    expected = logits_alone(alone, row)
    assert_same(logits, expected)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(model.named_parameters())
    for name, parameter in alone.named_parameters():
        assert_same(gradients[name].grad, parameter.grad)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts equality up to a few units in the last place of the largest number."""
    assert float(((found - expected).abs().max() / expected.abs().max()).detach()) < 2e-6


def logits_alone(model, row: dict) -> torch.Tensor:
    ids, boundaries = torch.from_numpy(row["input_ids"])[None], row["cumulative_len"].tolist()
    pieces = [
        model(ids[:, a:b], use_cache=False).logits
        for a, b in zip(boundaries[:-1], boundaries[1:], strict=True)
    ]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [None, 6])
def test_documents_do_not_see_each_other_under_flex_attention(window, checkpointing, monkeypatch):
    """Runs uncompiled: forward, and the gradient as PyTorch defines it, which PyTorch refuses to compute on a CPU.

    Shows that the block mask separates documents; a GPU kernel computes the same mask.
    """
    import torch.nn.attention.flex_attention as flex

    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    row = packed(LENGTHS)
    model = small_model("flex_attention", window).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.compiler.set_stance("force_eager"):
        compare_with_documents_alone(model, row, window)


def flash_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size=None,
):
    """Computes the same as flash-attn's kernel of this name: (tokens, heads, head_dim), one sequence per document."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    parts = []
    for a, b in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        group = q.shape[1] // k.shape[1]
        keys, values = (x[a:b].repeat_interleave(group, dim=1) for x in (k, v))
        distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = (distance >= 0) & (distance <= (window_size[0] if window_size else b - a))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * softmax_scale
        parts.append(
            torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), values)
        )
    return torch.cat(parts)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [None, 6])
def test_the_borders_reach_flash_attention(window, checkpointing, monkeypatch):
    """Covers transformers' whole path to flash-attn, except the kernel, which needs a GPU and is written out here."""
    import transformers.modeling_flash_attention_utils as flash

    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(
        flash, "_lazy_imports", lambda *args, **kwargs: (None, flash_varlen, None, None, None)
    )
    model = small_model("eager", window).train()
    model.config._attn_implementation = "flash_attention_2"  # the usual way to set it requires the package
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compare_with_documents_alone(model, packed(LENGTHS), window)


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex attention trains on a GPU")
def test_flex_attention_cannot_train_on_a_cpu():
    with pytest.raises(UserError, match="flex_attention cannot train on a CPU"):
        SupervisedFinetune(small_model("flex_attention"))


def test_documents_do_not_see_each_other_under_dropout():
    """The only path on which per-document sdpa may leave the flash kernel; it must still separate documents."""
    row = packed(LENGTHS)
    changed = {**row, "input_ids": np.r_[np.full(LENGTHS[0], 9), row["input_ids"][LENGTHS[0] :]]}
    outputs = []
    for each in (row, changed):
        data = packed_collate([each])["data"]
        model = small_model(PACKED).train()
        model.model.layers[0].self_attn.attention_dropout = 0.5
        torch.manual_seed(0)
        documents = packing_kwargs(data["cumulative_len"])
        positions = data["position_ids"]
        outputs.append(model(data["input_ids"], position_ids=positions, use_cache=False, **documents).logits)
    assert not torch.equal(outputs[0][:, :5], outputs[1][:, :5])
    assert torch.equal(outputs[0][:, 5:], outputs[1][:, 5:])
