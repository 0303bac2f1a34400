"""Greedy answers to many prompts at once: left-padded batches of similar length with a key-value cache.

A batch gives each row the tokens that the row would get alone: padding is masked and takes no part in the positions.
A row that has ended leaves the batch and its part of the cache is dropped, so a long answer does not hold up nine
short ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes:
        ids: The new ids, the one that stopped it included.
        stopped: Did it end with a stop id, within the limit?
        suppressed: At how many places a suppressed id had the largest logit.
    """

    ids: list[int]
    stopped: bool
    suppressed: int


def batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int, max_rows: int) -> list[list[int]]:
    """Groups prompts of similar length, the longest first, so that a lack of memory shows at once.

    Args:
        lengths: Ids in each prompt.
        max_new_tokens: Longest answer.
        batch_tokens: Ids that a padded batch may come to hold, answers included. A prompt that is longer than that
            makes a batch of its own.
        max_rows: Prompts in a batch.

    Returns:
        The places of the prompts of each batch.
    """
    result: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        rows = len(result[-1]) + 1 if result else 0
        if result and rows <= max_rows and (lengths[result[-1][0]] + max_new_tokens) * rows <= batch_tokens:
            result[-1].append(place)
        else:
            result.append([place])
    return result


@torch.inference_mode()
def generate_batched(
    model,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    *,
    suppress: Collection[int] = (),
    batch_tokens: int = 16384,
    max_rows: int = 32,
    on_answer: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Returns the greedy answer to each prompt, in the order of the prompts.

    Args:
        model: A transformers causal language model in eval mode.
        prompts: Token ids; none may be empty.
        stop_ids: An answer ends with the first of these.
        max_new_tokens: Ids after which an answer is cut.
        suppress: Ids that are never chosen.
        batch_tokens: Ids that a padded batch may come to hold, answers included: what bounds the cache.
        max_rows: Prompts in a batch.
        on_answer: Called with the place of a prompt and its answer as soon as there is one.
    """
    answers: list[Answer | None] = [None] * len(prompts)
    for places in batches([len(prompt) for prompt in prompts], max_new_tokens, batch_tokens, max_rows):
        rows = _Rows(model, [prompts[place] for place in places], suppress)
        while places:
            rows.step()
            kept = []
            for row, place in enumerate(places):
                ids = rows.new_ids[row]
                stopped = ids[-1] in stop_ids
                if not stopped and len(ids) < max_new_tokens:
                    kept.append(row)
                    continue
                answers[place] = Answer(ids, stopped, rows.suppressed[row])
                if on_answer:
                    on_answer(place, answers[place])
            if len(kept) < len(places):
                places = [places[row] for row in kept]
                if places:
                    rows.keep(kept)
    return answers  # type: ignore[return-value]  (every place is filled)


class _Rows:
    """The rows of a batch that still generate: their cache, mask and new ids."""

    def __init__(self, model, prompts: list[Sequence[int]], suppress: Collection[int]):
        from transformers import DynamicCache

        self._model = model
        self._device = model.device
        self._keep_last = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        longest = max(map(len, prompts))
        self._input = torch.zeros((len(prompts), longest), dtype=torch.long, device=self._device)
        self._mask = torch.zeros_like(self._input)
        for row, prompt in enumerate(prompts):
            self._input[row, longest - len(prompt) :] = torch.tensor(prompt, device=self._device)
            self._mask[row, longest - len(prompt) :] = 1
        # A padded place has position 0, as any masked place may.
        self._positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=model.config)
        self._suppress = torch.tensor(sorted(suppress), dtype=torch.long, device=self._device)
        self.new_ids: list[list[int]] = [[] for _ in prompts]
        self.suppressed = [0] * len(prompts)

    def step(self) -> None:
        """Appends one id to every row."""
        logits = self._model(
            input_ids=self._input,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._keep_last,
        ).logits[:, -1]
        best = logits.argmax(dim=-1)
        if len(self._suppress):
            logits[:, self._suppress] = -torch.inf
            allowed = logits.argmax(dim=-1)
            for row in (allowed != best).nonzero().flatten().tolist():
                self.suppressed[row] += 1
            best = allowed
        for ids, token in zip(self.new_ids, best.tolist(), strict=True):
            ids.append(token)
        self._input = best[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._input)], dim=1)
        self._positions = self._positions[:, -1:] + 1

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        index = torch.tensor(rows, device=self._device)
        self._input, self._mask, self._positions = (
            each[index] for each in (self._input, self._mask, self._positions)
        )
        self._cache.batch_select_indices(index)
        self.new_ids = [self.new_ids[row] for row in rows]
        self.suppressed = [self.suppressed[row] for row in rows]
