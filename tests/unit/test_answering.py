"""Answers are given in batches only where that changes nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig, JambaConfig, Lfm2Config, Llama4TextConfig, LlamaConfig, Mamba2Config

from snaketune.evaluation.answering import can_batch, generate_answers
from snaketune.models.base_model import fit_attention
from snaketune.models.twin import build, make_twin


def loaded(config):
    """A small model of an architecture, as evaluation loads it."""
    twin = make_twin(config, longest=32768, trust_remote_code=False)
    model = fit_attention("auto", "cpu", lambda name: build(twin.config, name, trust_remote_code=False))
    model.load_state_dict(twin.state_dict())
    return model.eval()


@torch.no_grad()
def alone(model, prompt, limit, suppress):
    ids = list(prompt)
    for _ in range(limit):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[suppress] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("config", [LlamaConfig(), GptOssConfig()])
def test_attention_answers_in_batches(config):
    assert can_batch(loaded(config))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LlamaConfig(), id="llama"),
        pytest.param(GptOssConfig(), id="sinks"),
        pytest.param(Llama4TextConfig(), id="chunked"),
        pytest.param(Mamba2Config(), id="mamba"),
        pytest.param(JambaConfig(), id="hybrid"),
        pytest.param(Lfm2Config(full_attn_idxs=[1], num_hidden_layers=2), id="short convolution"),
    ],
)
def test_answers_equal_those_without_cache_and_batch(config):
    model = loaded(config)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 250, (size,), generator=generator).tolist() for size in (30, 7, 19, 45)]
    free = [alone(model, prompt, 6, []) for prompt in prompts]
    banned = [free[0][0], free[1][2]]
    answers = generate_answers(model, prompts, {2}, 6, suppress=banned)
    assert [each.ids for each in answers] == [alone(model, prompt, 6, banned) for prompt in prompts]
    assert answers[0].suppressed > 0
