"""Forward passes of a part of DeepSpeed's engine, in ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def weights_on_use(model: nn.Module) -> Iterator[None]:
    """Lets ZeRO-3 gather a weight that the model's code reads without calling the weight's module (Gemma 3n, Gemma 4).

    DeepSpeed does so in the forward pass of its engine, but not when the model inside it is called. Without ZeRO-3 this
    does nothing.
    """
    weights = [each._parameters for each in model.modules() if hasattr(each._parameters, "_in_forward")]
    for each in weights:
        each._in_forward = True
    try:
        yield
    finally:
        for each in weights:
            each._in_forward = False
