"""Greedy answers to prompts: in batches where that gives what each prompt gives alone, else one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from snaketune.evaluation.batched_generation import Answer, generate_batched
from snaketune.models.base_model import fit_attention
from snaketune.models.isolation import random_row
from snaketune.models.twin import VOCABULARY, build, make_twin
from snaketune.settings.schema import default_of

_LENGTHS = (33, 9, 21)  # prompts of the trial; longer than the windows of a twin
_NEW = 8


def generate_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    *,
    suppress: Collection[int] = (),
    batch_tokens: int = default_of("tool_calls.batch_tokens"),
    on_answer: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Returns the greedy answer to each prompt; see `generate_batched` for the arguments."""
    if can_batch(model):
        return generate_batched(
            model,
            prompts,
            stop_ids,
            max_new_tokens,
            suppress=suppress,
            batch_tokens=batch_tokens,
            on_answer=on_answer,
        )
    print(
        f"{model.config.model_type}: prompts are answered one at a time; in batches the answers would differ"
    )
    answers = []
    for place, prompt in enumerate(prompts):
        answers.append(generate_alone(model, prompt, stop_ids, max_new_tokens, suppress))
        if on_answer:
            on_answer(place, answers[-1])
    return answers


@torch.inference_mode()
def can_batch(model: PreTrainedModel) -> bool:
    """True if batches give the same answers as prompts alone, without a cache. Tries it on a small model of the kind."""
    config = copy.deepcopy(model.config)
    try:
        twin = make_twin(config, longest=sum(_LENGTHS), trust_remote_code=hasattr(config, "auto_map"))
        attention = model.config._attn_implementation
        small = fit_attention(
            attention, "cpu", lambda name: build(twin.config, name, hasattr(config, "auto_map"))
        )
        small.load_state_dict(twin.state_dict())
        prompts = [
            random_row(VOCABULARY, (length,), seed).ids[0].tolist() for seed, length in enumerate(_LENGTHS)
        ]
        answers = generate_batched(small.eval(), prompts, (), _NEW)
    except Exception:  # whatever the model's own code raises
        return False
    return all(
        answer.ids == _without_cache(twin, prompt) for prompt, answer in zip(prompts, answers, strict=True)
    )


def _without_cache(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(_NEW):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class _Suppress(LogitsProcessor):
    """Excludes ids, and counts how often one of them had the largest logit."""

    def __init__(self, ids: Collection[int]):
        self.ids, self.count = sorted(ids), 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.count += int(scores[0].argmax().item() in self.ids)
        scores = scores.clone()
        scores[:, self.ids] = -torch.inf
        return scores


@torch.inference_mode()
def generate_alone(
    model: PreTrainedModel,
    prompt: Sequence[int],
    stop_ids: Collection[int],
    max_new_tokens: int,
    suppress: Collection[int] = (),
) -> Answer:
    """Returns the greedy answer to one prompt, by transformers' own `generate` and the model's own cache."""
    suppressed = _Suppress(suppress)
    # Overrides the model's own settings, which may sample.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop_ids) or None, pad_token_id=0
    )
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        use_cache=True,
        logits_processor=LogitsProcessorList([suppressed] if suppress else []),
    )
    new = output[0, ids.shape[1] :].tolist()
    return Answer(new, bool(new) and new[-1] in stop_ids, suppressed.count)
