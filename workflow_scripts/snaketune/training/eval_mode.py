"""Evaluates the model in training, outside the forward pass of DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode in which it can be called without the engine; then restores its mode.

    Lets ZeRO-3 gather a weight that the model's code reads without calling the weight's module (Gemma 3n, Gemma 4).
    DeepSpeed does so only in the forward pass of its engine.
    """
    training = model.training
    weights = [each._parameters for each in model.modules() if hasattr(each._parameters, "_in_forward")]
    model.eval()
    for each in weights:
        each._in_forward = True
    try:
        yield
    finally:
        for each in weights:
            each._in_forward = False
        model.train(training)
