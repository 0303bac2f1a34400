"""Modules that run document by document, in ZeRO-3.

Ranks have different numbers of documents. A rank waits forever for the others to gather a part of such a module that it
calls more often than they do.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from snaketune.models.per_document import run_per_document_kinds


def gather_for_all_documents(model: nn.Module) -> None:
    """Makes ZeRO-3 gather all weights of a module that runs document by document when it enters the module.

    Must run before DeepSpeed wraps the model.
    """
    kinds = run_per_document_kinds(model)
    if not kinds:
        return
    from deepspeed.utils import set_z3_leaf_modules

    for module in set_z3_leaf_modules(model, kinds):
        module.register_forward_pre_hook(_pass_input_with_gradient, with_kwargs=True)


def _pass_input_with_gradient(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Passes the first argument by position, with a gradient.

    DeepSpeed reduces the module's gradients in a backward hook. Without the gradient of an argument passed by position,
    PyTorch would call that hook before the gradients are computed.
    """
    if not args:
        name = next(name for name in inspect.signature(type(module).forward).parameters if name != "self")
        args, kwargs = (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}
    hidden = args[0]
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return (hidden, *args[1:]), kwargs
