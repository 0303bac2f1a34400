"""Turns an error of a base model's own code in its first forward pass into a message for the user."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from snaketune.common.cli import UserError

# Errors that depend on the architecture and the settings alone. RuntimeError is not among them: a GPU that is out of
# memory or broken raises it too.
_RECURRING = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)
_MODEL_CODE = ("transformers.", "transformers_modules.")


@contextmanager
def refuse_unsupported(model: nn.Module) -> Iterator[None]:
    """Raises a `UserError` if the model's own code fails in the block, and prints the traceback to the log.

    An error that comes from other code, such as ours, is raised as it is.
    """
    try:
        yield
    except _RECURRING as error:
        if isinstance(error, UserError) or not _place(error).startswith(_MODEL_CODE):
            raise
        traceback.print_exc()
        raise UserError(
            f"{type(model).__name__} cannot be trained with these settings: its own code fails in the first step",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="a model that takes several documents in a row",
            fix="use another base model, or report the traceback above",
        ) from error


def _place(error: BaseException) -> str:
    """Returns the name of the innermost module in the traceback that is not part of torch."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_globals.get("__name__", "") for frame in frames]
    return next((name for name in reversed(names) if name.partition(".")[0] != "torch"), "")
