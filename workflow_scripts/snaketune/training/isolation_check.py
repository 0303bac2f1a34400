"""Checks a model before its first step: the documents of a packed sequence must not affect each other.

`prove_architecture` has shown this for a small model on a CPU. This looks at the real one, on its device, with the
kernels that will train it.
"""

from __future__ import annotations

import torch

from snaketune.common.cli import UserError
from snaketune.models.isolation import LEAK_16, LEAK_32, leak, random_row
from snaketune.training.eval_mode import eval_mode

_TRIES = 3  # with 16 bits, a router may choose other experts because of rounding


def require_isolated_documents(model: torch.nn.Module) -> None:
    """Runs forward passes over random documents. Leaves random states and training mode as they were.

    All ranks call it together: under ZeRO-3 they gather the weights.

    Args:
        model: The causal language model in training, on its device.

    Raises:
        UserError: Logits of one document change when another one changes.
    """
    exact = next(model.parameters()).dtype == torch.float32
    bound = LEAK_32 if exact else LEAK_16
    vocabulary = model.config.get_text_config().vocab_size
    with eval_mode(model):
        for seed in range(_TRIES):
            moved = leak(model, random_row(vocabulary, seed=seed))
            if moved <= bound:
                return
    raise UserError(
        f"documents of a packed sequence see each other in {model.config.model_type}",
        found=f"logits of a document move by {moved:.2g} of their standard deviation when another document changes "
        f"(attention {model.config._attn_implementation})",
        expected=f"at most {bound:g}",
        fix="set packing.mode: single, or another train.attention; prove_architecture.py says which works",
    )
