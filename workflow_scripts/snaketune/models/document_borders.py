"""Finds the parts of a model that do not end at the documents of a packed sequence, and runs them per document.

They are found by trying: a twin of the model runs on a packed sequence, and each part of each layer is given the whole
sequence and each document by itself.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed

from snaketune.models.document_masks import WITH_MASKS
from snaketune.models.documents import note_documents
from snaketune.models.isolation import BOUND, logits_of, main_output, random_row, relative_difference
from snaketune.models.packed_attention import PACKED
from snaketune.models.per_document import call_per_document, run_per_document
from snaketune.models.twin import layer_list, make_twin

_FOUND: dict[str, frozenset[type[nn.Module]]] = {}


def keep_documents_apart(model: PreTrainedModel) -> None:
    """Makes the parts of a model that carry state across documents run document by document, as far as it has any.

    This changes calls with `packing_kwargs` alone. The proof of the architecture shows whether it is enough.
    """
    kinds = _leaking_kinds(model)
    if kinds or model.config._attn_implementation in WITH_MASKS:
        note_documents(model)
    run_per_document(model, kinds)


def _leaking_kinds(model: PreTrainedModel) -> frozenset[type[nn.Module]]:
    """Returns the classes of the parts that give a document in a packed sequence something else than the document alone.

    Makes a twin, in seconds, unless all layers are of a usual kind. Empty if no twin can be made.
    """
    layers = layer_list(model)
    if layers is None or all(_only_attention_mixes(layer) for layer in layers):
        return frozenset()
    key = json.dumps(
        [repr(type(model)), model.config._attn_implementation, model.config.to_dict()], default=str
    )
    if key not in _FOUND:
        remote = not type(model).__module__.startswith("transformers.")
        _FOUND[key] = _try(model.config, remote)
    return _FOUND[key]


def _only_attention_mixes(layer: nn.Module) -> bool:
    """True if tokens see each other through transformers' attention functions alone, as far as a layer's code tells."""
    modules = list(layer.modules())
    code = [getattr(inspect.unwrap(type(each).forward), "__code__", None) for each in modules]
    calls = any(each and "ALL_ATTENTION_FUNCTIONS" in each.co_names for each in code)
    return calls and not any(isinstance(each, nn.Conv1d) for each in modules)


@torch.no_grad()
def _try(config: PretrainedConfig, remote: bool) -> frozenset[type[nn.Module]]:
    found: set[type[nn.Module]] = set()
    attention = PACKED if "flash" in config._attn_implementation else config._attn_implementation
    with torch.random.fork_rng(devices=[]), _weights_in_one_piece():
        try:
            twin = make_twin(config, longest=0, trust_remote_code=remote)
            if attention != twin.config._attn_implementation:
                twin.set_attn_implementation(attention)
            if attention in WITH_MASKS:
                note_documents(twin)
            row = random_row(twin.config.get_text_config().vocab_size)
            for layer in layer_list(twin):
                for part in layer.children():
                    part.forward = _Trial(part, row.boundaries, found)
            logits_of(twin, row)
        except Exception:  # whatever the model's own code raises; then the proof says what is wrong
            return frozenset()
    return frozenset(found)


class _Trial:
    """Runs a part of a layer per document, and adds its class to `found` if the packed sequence gives something else."""

    def __init__(self, part: nn.Module, boundaries: list[int], found: set[type[nn.Module]]):
        self.part, self.boundaries, self.found = part, boundaries, found
        self.plain = part.forward

    def __call__(self, *args, **kwargs):
        try:
            apart = call_per_document(self.plain, self.boundaries, args, kwargs)
        except Exception:  # a part that takes something else
            return self.plain(*args, **kwargs)
        try:
            moved = relative_difference(main_output(self.plain(*args, **kwargs)), main_output(apart))
        except Exception:  # a part that refuses packed sequences
            moved = math.inf
        if not moved <= BOUND:
            self.found.add(type(self.part))
        return apart


@contextmanager
def _weights_in_one_piece() -> Iterator[None]:
    """Lets transformers build a model whole while a training loads its own in shards (ZeRO-3)."""
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
