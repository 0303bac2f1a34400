"""Layers that carry state run document by document. For whole families, see test_architecture_proof.py."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import JambaConfig, Lfm2Config, LlamaConfig

from snaketune.models import document_borders
from snaketune.models.base_model import fit_attention
from snaketune.models.isolation import Row, logits_of, random_row
from snaketune.models.per_document import call_per_document, run_per_document_kinds
from snaketune.models.twin import VOCABULARY, build, make_twin
from snaketune.training.supervised_finetune import SupervisedFinetune

LFM2 = Lfm2Config(full_attn_idxs=[1], num_hidden_layers=3)
# 128 tokens, as many as the twin is wide; some documents are shorter than a convolution.
LENGTHS = (5, 1, 60, 2, 60)


@pytest.fixture(scope="module")
def twins():
    """(the model as training loads it, the same weights in transformers alone)"""
    plain = make_twin(LFM2, longest=0, trust_remote_code=False)
    model = fit_attention("auto", "cpu", lambda name: build(plain.config, name, trust_remote_code=False))
    model.load_state_dict(plain.state_dict())
    return model.eval(), plain


def batch(row: Row) -> dict:
    boundaries = torch.tensor(row.boundaries)
    labels = row.ids.clone()
    labels[:, row.boundaries[:-1]] = -100
    return {
        "input_ids": row.ids,
        "labels": labels,
        "position_ids": row.inputs()["position_ids"],
        "cumulative_len": boundaries,
    }


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    return found


def test_a_model_gets_no_borders_that_it_does_not_need():
    config = make_twin(LlamaConfig(), longest=0, trust_remote_code=False).config
    model = fit_attention("auto", "cpu", lambda name: build(config, name, trust_remote_code=False))
    assert not run_per_document_kinds(model) and not model._forward_pre_hooks


@torch.no_grad()
def test_documents_of_all_lengths(twins):
    model, plain = twins
    assert model.config.hidden_size == sum(LENGTHS)
    row = random_row(VOCABULARY, LENGTHS)
    alone = torch.cat([logits_of(plain, each) for each in row.documents()])
    for each in (model, copy.deepcopy(model)):
        torch.testing.assert_close(logits_of(each, row), alone, rtol=1e-4, atol=1e-4)
    assert (logits_of(plain, row) - alone).abs().max() > 0.5


def test_a_backward_pass_recomputes_with_the_borders_of_its_own_row(twins):
    """After another row's forward pass, and in another thread, as PyTorch does on a GPU."""
    model, plain = copy.deepcopy(twins)
    trained = SupervisedFinetune(model, gradient_checkpointing=True).train()
    rows = [random_row(VOCABULARY, lengths, seed) for seed, lengths in enumerate([LENGTHS, (20, 44), (128,)])]
    losses = [trained(batch(row))["loss"] for row in rows]
    for row, loss in zip(rows, losses, strict=True):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        found = gradients(model)
        targets = sum(each.ids.shape[1] - 1 for each in row.documents())
        for each in row.documents():
            logits = logits_of(plain, each)
            alone = torch.nn.functional.cross_entropy(logits[:-1], each.ids[0, 1:], reduction="sum")
            (alone / targets).backward()
        expected = gradients(plain)
        total = torch.stack([each.norm() for each in expected.values()]).norm()
        assert max((found[name] - expected[name]).norm() / total for name in expected) < 1e-5


def test_arguments_are_cut_and_results_joined():
    """Masks in both dimensions, and a width that equals the number of tokens not at all."""
    tokens, boundaries = 6, [0, 2, 6]
    seen = []

    def part(hidden, mask, cos, position_ids, masks, cu_seq_lens_q=None, state=None):
        assert cu_seq_lens_q is None and state is None
        seen.append((hidden.shape, mask.shape, cos.shape, position_ids.tolist(), masks["own"].shape))
        return hidden, (hidden.sum(1), None)

    hidden = torch.randn(1, tokens, tokens)
    joined, states = call_per_document(
        part,
        boundaries,
        (hidden, torch.zeros(1, 1, tokens, tokens)),
        {
            "cos": torch.zeros(1, tokens, 4),
            "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]]),
            "masks": {"own": torch.zeros(1, tokens)},
            "cu_seq_lens_q": torch.tensor(boundaries),
            "state": None,
        },
    )
    assert torch.equal(joined, hidden) and states == (None, None)
    assert seen == [
        ((1, 2, 6), (1, 1, 2, 2), (1, 2, 4), [[0, 1]], (1, 2)),
        ((1, 4, 6), (1, 1, 4, 4), (1, 4, 4), [[0, 1, 2, 3]], (1, 4)),
    ]
    with pytest.raises(ValueError, match=r"got \(2, 6, 4\) instead of \(1, 6, width\)"):
        call_per_document(part, boundaries, (torch.zeros(2, tokens, 4),), {})


def test_a_look_at_a_model_changes_no_random_state():
    document_borders._FOUND.clear()
    config = make_twin(JambaConfig(), longest=0, trust_remote_code=False).config
    model = build(config, "eager", trust_remote_code=False)
    state = torch.get_rng_state()
    document_borders.keep_documents_apart(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.__name__ for each in run_per_document_kinds(model)] == ["JambaMambaMixer"]
