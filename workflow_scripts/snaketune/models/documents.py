"""The boundaries of the documents in a packed sequence, while a model runs on it.

Layers without attention, and some models' masks, are not given them. Here they are noted when the model is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from transformers import PreTrainedModel

# Boundaries [0, ..., tokens] of the running packed sequence; None for any other input.
_BOUNDARIES: ContextVar[list[int] | None] = ContextVar("boundaries", default=None)


def note_documents(model: PreTrainedModel) -> None:
    """Makes `current_boundaries` answer while the model runs on a packed sequence."""
    model.register_forward_pre_hook(_note, with_kwargs=True)
    model.register_forward_hook(_forget, always_call=True)


def current_boundaries() -> list[int] | None:
    """Returns the boundaries of the packed sequence that a model is running on; None if it runs on anything else."""
    return _BOUNDARIES.get()


@contextmanager
def with_boundaries(boundaries: list[int] | None) -> Iterator[None]:
    """Sets what `current_boundaries` returns in the block, in this thread."""
    token = _BOUNDARIES.set(boundaries)
    try:
        yield
    finally:
        _BOUNDARIES.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Keeps the boundaries for a recomputation: pass it to `torch.utils.checkpoint` as `context_fn`.

    A backward pass recomputes after the model has returned, on a GPU in another thread.
    """
    return nullcontext(), with_boundaries(_BOUNDARIES.get())


def _note(model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
    boundaries = kwargs.get("cu_seq_lens_q")
    _BOUNDARIES.set(None if boundaries is None else boundaries.tolist())


def _forget(model: PreTrainedModel, args: tuple, output: object) -> None:
    _BOUNDARIES.set(None)
