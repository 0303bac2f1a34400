"""The loss of a head that never computes all logits at once, compared with the plain loss, for common heads."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, linear

from snaketune.common.cli import UserError
from snaketune.models import cross_entropy as module
from snaketune.models.cross_entropy import chunked_cross_entropy, linear_cross_entropy
from snaketune.training.packed_data import packed_collate
from snaketune.training.supervised_finetune import SupervisedFinetune
from tensor_sizes import TensorSizes

TOKENS, HIDDEN, VOCABULARY = 150, 24, 211


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Sixteen tokens per chunk, and a smaller last chunk."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)


def parts(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(VOCABULARY, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    vector = torch.randn(VOCABULARY, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, weight, vector, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


@pytest.mark.parametrize("way", ["linear", "any head"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["", "hidden", "weight"])
def test_same_loss_and_gradients_in_fp32(way, bias, frozen):
    hidden, weight, vector, targets = parts(bias=bias)
    {"hidden": hidden, "weight": weight}.get(frozen, torch.empty(0)).requires_grad_(False)
    ours = [None if part is None else part.detach().clone().requires_grad_(part.requires_grad)
            for part in (hidden, weight, vector)]  # fmt: skip
    expected = cross_entropy(linear(hidden, weight, vector), targets)
    expected.backward()
    if way == "linear":
        total = linear_cross_entropy(*ours, targets)
    else:
        total = chunked_cross_entropy(
            ours[0], targets, VOCABULARY, lambda rows: linear(rows, ours[1], ours[2])
        )
    loss = total / TOKENS
    loss.backward()
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for mine, theirs in zip(ours, (hidden, weight, vector), strict=True):
        if theirs is not None:
            assert (mine.grad is None) == (theirs.grad is None)
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-7, rtol=2e-5)


def test_bfloat16_keeps_the_digits_of_the_plain_way():
    """Compares both with fp64 on the same bfloat16 numbers, for ten chunks, each rounded once more."""
    hidden, weight, _, targets = parts(torch.bfloat16, bias=False)
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    (cross_entropy(linear(*exact), targets, reduction="sum")).backward()
    plain = [part.detach().clone().requires_grad_() for part in (hidden, weight)]
    cross_entropy(linear(*plain).float(), targets, reduction="sum").backward()
    loss = linear_cross_entropy(hidden, weight, None, targets)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    for ours, theirs, truth in zip((hidden, weight), plain, exact, strict=True):
        error, usual = ((part.grad.double() - truth.grad).norm() for part in (ours, theirs))
        assert error <= 1.5 * usual


def test_logits_are_never_whole():
    hidden, weight, _, targets = parts(bias=False)
    with TensorSizes() as plain:
        cross_entropy(linear(hidden, weight), targets).backward()
    with TensorSizes() as ours:
        linear_cross_entropy(hidden, weight, None, targets).backward()
    with TensorSizes() as any_head:
        chunked_cross_entropy(hidden, targets, VOCABULARY, lambda rows: linear(rows, weight)).backward()
    assert plain.largest == TOKENS * VOCABULARY
    assert max(ours.largest, any_head.largest) == max(16 * VOCABULARY, TOKENS * HIDDEN, VOCABULARY * HIDDEN)


def test_without_gradients_none_are_made():
    hidden, weight, _, targets = parts(bias=False)
    with torch.no_grad(), TensorSizes() as sizes:
        loss = linear_cross_entropy(hidden, weight, None, targets)
    assert not loss.requires_grad and sizes.largest < VOCABULARY * HIDDEN
    loss = linear_cross_entropy(hidden, weight, None, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already been back-propagated"):
        loss.backward()


class CutLlama(transformers.LlamaForCausalLM):
    """Returns only the logits of its first 60 tokens, like models with a padded head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :60]
        return output


SIZES = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    # name: (class, config, True if the model returns the head's output)
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES), True),
    "tied": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, tie_word_embeddings=True), True),
    "phi, a bias": (transformers.PhiForCausalLM, transformers.PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"} | {"hidden_size": 32}), True),
    "gemma2, capped": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(**SIZES, final_logit_softcapping=2.0, attn_logit_softcapping=None),
        False,
    ),
    "cohere, scaled": (transformers.CohereForCausalLM, transformers.CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.3), False),
    "granite, divided": (transformers.GraniteForCausalLM, transformers.GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=3.0), False),
    "cut": (CutLlama, transformers.LlamaConfig(**SIZES), False),
}  # fmt: skip


def one_document(seed: int = 0) -> dict:
    ids = np.random.RandomState(seed).randint(3, 60, 90)
    labels = np.where(np.arange(90) % 3 == 1, -100, ids)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": np.arange(90),
        "cumulative_len": np.array([0, 90]),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_heads(family):
    kind, config, in_head = FAMILIES[family]
    torch.manual_seed(2)
    plain = kind(config).train()
    model = SupervisedFinetune(copy.deepcopy(plain), gradient_checkpointing=False).train()
    row = one_document()
    before = torch.get_rng_state()
    loss = model(**packed_collate([row]))["loss"]
    loss.backward()
    assert torch.equal(
        torch.get_rng_state(), before
    )  # probing the model does not draw from the run's random numbers
    logits = plain(torch.from_numpy(row["input_ids"])[None], use_cache=False).logits[0, :-1]
    expected = cross_entropy(logits.float(), torch.from_numpy(row["labels"])[1:])
    expected.backward()
    assert model._loss_in_head == in_head
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    gradients = dict(model.llm.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)
    again = model.llm(torch.from_numpy(row["input_ids"])[None], use_cache=False).logits
    assert again.shape[:2] == (1, 90)  # the head is restored


def test_a_head_with_trained_rows_of_lora():
    from snaketune.models.lora import add_lora

    torch.manual_seed(2)
    kind, config, _ = FAMILIES["llama"]
    plain = kind(config).train()
    add_lora(plain, {"rank": 2, "alpha": 4}, [60, 61])
    model = SupervisedFinetune(copy.deepcopy(plain), gradient_checkpointing=False).train()
    row = one_document()
    loss = model(**packed_collate([row]))["loss"]
    loss.backward()
    logits = plain(torch.from_numpy(row["input_ids"])[None], use_cache=False).logits[0, :-1]
    expected = cross_entropy(logits.float(), torch.from_numpy(row["labels"])[1:])
    expected.backward()
    assert model._loss_in_head and loss.item() == pytest.approx(expected.item(), abs=1e-6)
    gradients = dict(model.llm.named_parameters())
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained)
    for name, parameter in trained.items():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)


def test_liger_needs_its_package_and_a_gpu():
    kind, config, _ = FAMILIES["llama"]
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a GPU and the package liger-kernel"):
            SupervisedFinetune(kind(config), cross_entropy="liger")
    with pytest.raises(UserError, match="chunked or liger"):
        SupervisedFinetune(kind(config), cross_entropy="fused")
