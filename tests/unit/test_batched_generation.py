"""Batched answers equal, token for token, those of a plain loop without a cache."""

from __future__ import annotations

import random

import pytest
import torch

from snaketune.evaluation.batched_generation import generate_batched

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["llama", "sliding_window"])
def model(request, tiny_model_dir):
    """The tiny random Llama, and a random Mistral with a small sliding window."""
    from snaketune.models.base_model import load_base_model
    from snaketune.models.packed_attention import PACKED

    if request.param == "llama":
        return load_base_model(str(tiny_model_dir), "float32").eval()
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        attn_implementation=PACKED,
    )
    return MistralForCausalLM(config).eval()


@torch.no_grad()
def alone(model, prompt, stop_ids, limit, suppress=()):
    """Greedy answer to one prompt; recomputes the whole text for every token."""
    ids = list(prompt)
    while len(ids) - len(prompt) < limit:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        for token in suppress:
            logits[token] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def prompts(model):
    pick, size = random.Random(3), model.config.vocab_size
    return [[pick.randrange(3, size) for _ in range(pick.randrange(1, 30))] for _ in range(14)]


@pytest.mark.parametrize("batch_tokens", [1, 120, 10_000])
def test_a_batch_answers_as_one_by_one(model, prompts, batch_tokens):
    free = [alone(model, prompt, (), 16) for prompt in prompts]
    # Ids that occur early in some answers and late, or never, in others.
    stop_ids = {free[0][2], free[1][7], free[2][0]}
    expected = [alone(model, prompt, stop_ids, 16) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 2, "the answers must end at different positions"
    seen = {}
    answers = generate_batched(
        model, prompts, stop_ids, 16, batch_tokens=batch_tokens, on_answer=seen.__setitem__
    )
    assert [answer.ids for answer in answers] == expected
    assert [answer.stopped for answer in answers] == [ids[-1] in stop_ids for ids in expected]
    assert [seen[place] for place in range(len(prompts))] == answers


def test_a_suppressed_id_is_never_said_and_counted(model, prompts):
    free = [alone(model, prompt, (), 8) for prompt in prompts]
    suppress = {free[0][0], free[3][1]}
    answers = generate_batched(model, prompts, (), 8, suppress=suppress)
    assert [answer.ids for answer in answers] == [alone(model, prompt, (), 8, suppress) for prompt in prompts]
    assert answers[0].suppressed > 0
    for answer, before in zip(answers, free, strict=True):
        assert (answer.suppressed > 0) == bool(suppress & set(before))


@pytest.mark.parametrize("max_rows", [1, 3, 32])
def test_prompts_with_a_common_beginning_are_answered_as_one_by_one(model, prompts, max_rows):
    begin = prompts[0] + prompts[1]
    family = [begin[:1], begin[:1], begin[:7], *(begin + more for more in prompts[:4]), begin, begin]
    answers = generate_batched(model, family, (), 12, max_rows=max_rows)
    assert [answer.ids for answer in answers] == [alone(model, prompt, (), 12) for prompt in family]


def test_a_batch_keeps_its_bounds(model, prompts):
    seen = []

    def note(module, arguments, options):
        rows, new = options["input_ids"].shape
        if new == 1 and options["attention_mask"] is not None:
            seen.append((rows, options["attention_mask"].shape[1]))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        generate_batched(model, prompts, (), 10, batch_tokens=120, max_rows=4)
    finally:
        hook.remove()
    assert max(rows for rows, _ in seen) in (3, 4)
    assert all(rows == 1 or (rows <= 4 and rows * width <= 120) for rows, width in seen)
