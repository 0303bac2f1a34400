"""Greedy answers to many prompts at once, with a key-value cache.

Prompts are prefilled one at a time: without padding, attention is plainly causal, and a prompt reuses the
cache of the prefix that it shares with the previous prompt, such as the earlier turns of a conversation. They
then join a right-aligned batch. Padding is masked and not counted in the positions, so each row gets the
tokens that it would get alone. A finished row makes room for the next prompt, so a long answer does not hold
up others.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicLayer

from snaketune.settings.schema import default_of


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes:
        ids: The new ids, including the stop id.
        stopped: True if it ended with a stop id within the limit.
        suppressed: Number of positions where a suppressed id had the largest logit.
    """

    ids: list[int]
    stopped: bool
    suppressed: int


def entry_order(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Returns the indices of the prompts in the most efficient order.

    Prompts that share at least half of their ids form a family and are adjacent. The family with the longest
    prompt comes first, so that running out of memory shows early. Prompts of similar length, which need
    little padding, end up in the same batch.
    """
    families: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda place: list(prompts[place])):
        prompt = prompts[place]
        if families and 2 * _shared(prompts[families[-1][-1]], prompt) >= len(prompt):
            families[-1].append(place)
        else:
            families.append([place])
    families.sort(key=lambda family: -max(len(prompts[place]) for place in family))
    return [place for family in families for place in family]


@torch.inference_mode()
def generate_batched(
    model,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    *,
    suppress: Collection[int] = (),
    batch_tokens: int = default_of("tool_calls.batch_tokens"),
    max_rows: int = 32,
    on_answer: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Returns the greedy answer to each prompt, in the order of the prompts.

    Args:
        model: A transformers causal language model in eval mode, all of whose layers are attention.
        prompts: Token ids; none may be empty.
        stop_ids: An answer ends at the first of these.
        max_new_tokens: Maximum ids of an answer; longer ones are cut.
        suppress: Ids that are never chosen.
        batch_tokens: Maximum ids of a padded batch, answers included; bounds the cache. A longer prompt is
            answered alone.
        max_rows: Maximum prompts in a batch.
        on_answer: Called with the index of a prompt and its answer as soon as the answer is complete.
    """
    answers: list[Answer | None] = [None] * len(prompts)
    waiting = deque(entry_order(prompts))
    batch = _Batch(model, suppress)
    places: list[int] = []
    while waiting or places:
        kept = [row for row, place in enumerate(places) if answers[place] is None]
        # A change copies the whole cache, so wait until enough rows have ended.
        if 8 * (len(places) - len(kept)) >= len(places):
            places = [places[row] for row in kept]
            longest = max((len(prompts[place]) for place in places), default=0)
            fresh = []
            while waiting:
                longest = max(longest, len(prompts[waiting[0]]))
                rows = len(places) + len(fresh) + 1
                if rows > 1 and (rows > max_rows or rows * (longest + max_new_tokens) > batch_tokens):
                    break
                fresh.append(waiting.popleft())
            places += fresh
            if not places:
                break
            batch.change(kept, [prompts[place] for place in fresh])
        batch.step()
        for row, place in enumerate(places):
            ids = batch.new_ids[row]
            stopped = ids[-1] in stop_ids
            if answers[place] is None and (stopped or len(ids) == max_new_tokens):
                answers[place] = Answer(list(ids), stopped, batch.suppressed[row])
                if on_answer:
                    on_answer(place, answers[place])
    return answers  # type: ignore[return-value]  (every place is filled)


class _Layer(DynamicLayer):
    """A cache layer that is written in place; the one of transformers copies itself for every new id.

    Keeps all ids even with sliding-window attention: the mask limits the window.
    """

    _SPARE = 64

    def hold(self, rows: list[tuple[torch.Tensor, torch.Tensor]], width: int, room: int) -> None:
        """Stores the keys and values of rows, each (heads, length, dim), right-aligned.

        Args:
            rows: At least one.
            width: The largest length.
            room: Ids to allocate space for.
        """
        self.lazy_initialization(*rows[0])
        # Zeros, since masked values must not be NaN.
        self._rooms = [
            like.new_zeros(len(rows), like.shape[0], room + self._SPARE, like.shape[2]) for like in rows[0]
        ]
        for row, parts in enumerate(rows):
            for space, part in zip(self._rooms, parts, strict=True):
                space[row, :, width - part.shape[1] : width] = part
        self.keys, self.values = (space[:, :, :width] for space in self._rooms)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Appends keys and values (rows, heads, new ids, dim) and returns all of them."""
        held = self.get_seq_length()
        stop = held + key_states.shape[2]
        if not self.is_initialized or stop > self._rooms[0].shape[2]:
            old = (self.keys, self.values) if held else (key_states[:, :, :0], value_states[:, :, :0])
            self.hold(list(zip(*old, strict=True)), held, stop)
        for space, new in zip(self._rooms, (key_states, value_states), strict=True):
            space[:, :, held:stop] = new
        self.keys, self.values = (space[:, :, :stop] for space in self._rooms)
        return self.keys, self.values


class _Batch:
    """The rows being generated: their cache, mask and new ids."""

    def __init__(self, model, suppress: Collection[int]):
        self._model = model
        self._device = model.device
        self._keep_last = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self._suppress = torch.tensor(sorted(suppress), dtype=torch.long, device=self._device)
        self._entered: Sequence[int] = []  # the prompt whose keys and values are in `_entry`
        self._entry = Cache(layer_class_to_replicate=_Layer)
        self._cache = Cache(layer_class_to_replicate=_Layer)
        self.new_ids: list[list[int]] = []
        self.suppressed: list[int] = []

    def change(self, kept: list[int], prompts: list[Sequence[int]]) -> None:
        """Keeps only the given rows, and appends new ones."""
        entered = [self._enter(prompt) for prompt in prompts]
        inputs = [self.new_ids[row][-1] for row in kept] + [prompt[-1] for prompt in prompts]
        lengths = [self._positions[row].item() for row in kept] + [len(prompt) - 1 for prompt in prompts]
        width = max(lengths)
        old, layers = self._cache.layers, []
        for number in range(len(self._entry.layers)):
            rows = [
                tuple(
                    part[row, :, part.shape[2] - length :] for part in (old[number].keys, old[number].values)
                )
                for row, length in zip(kept, lengths, strict=False)
            ]
            layers.append(_Layer())
            layers[-1].hold(rows + [parts.pop(0) for parts in entered], width, width)
            if old:
                old[number] = None  # so that at most one layer is in memory twice
        self._cache = Cache(layers=layers)
        self._input = torch.tensor(inputs, device=self._device)[:, None]
        self._positions = torch.tensor(lengths, device=self._device)[:, None]
        self._mask = (torch.arange(width + 1, device=self._device) >= width - self._positions).long()
        self.new_ids = [self.new_ids[row] for row in kept] + [[] for _ in prompts]
        self.suppressed = [self.suppressed[row] for row in kept] + [0] * len(prompts)

    def step(self) -> None:
        """Appends one id to every row."""
        logits = self._forward(self._input, self._positions, self._cache, self._mask).logits[:, -1]
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
        self._positions = self._positions + 1

    def _enter(self, prompt: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns each layer's keys and values, (heads, ids, dim), for a prompt without its last id."""
        shared = min(_shared(self._entered, prompt), len(prompt) - 1)
        self._entry.crop(shared - len(self._entered))
        self._entered = prompt
        ids = torch.tensor([prompt[shared:]], device=self._device)
        positions = torch.arange(shared, len(prompt), device=self._device)[None]
        self._forward(ids, positions, self._entry, None)
        return [
            tuple(part[0, :, : len(prompt) - 1].clone() for part in (layer.keys, layer.values))
            for layer in self._entry.layers
        ]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, cache: Cache, mask: torch.Tensor | None):
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._keep_last,
        )


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the length of the common prefix of two prompts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
