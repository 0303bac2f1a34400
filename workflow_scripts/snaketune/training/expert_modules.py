"""Mixtures of experts with a module for each expert, of which a forward pass calls only those that get tokens.

The causal language models of transformers 5 keep all experts of a layer in one parameter; remote code may not. In ZeRO-3 a
rank waits forever for the others to gather an expert that they do not call. In ZeRO 1 and 2 the ranks sum the gradients
of different experts, since they sum them in the order in which each rank computes them.
"""

from __future__ import annotations

from torch import nn

from snaketune.common.cli import UserError


def use_experts_together(model: nn.Module, zero_stage: int, ranks: int) -> None:
    """Makes ZeRO-3 gather all experts of a layer when it enters the layer.

    Raises:
        UserError: Several ranks cannot train this model in stages 1 and 2.
    """
    layers = {type(module) for module in model.modules() if _has_modules_of_experts(module)}
    if not layers or zero_stage == 0 or ranks == 1:
        return
    if zero_stage < 3:
        raise UserError(
            "ZeRO 1 and 2 cannot train a model with a module for each expert on several ranks",
            found=f"{', '.join(sorted(kind.__name__ for kind in layers))}, zero_stage {zero_stage}, {ranks} ranks",
            expected="zero_stage 3, which gathers all experts of a layer together, or 0",
            fix="set train.zero_stage to 3",
        )
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, list(layers))


def _has_modules_of_experts(module: nn.Module) -> bool:
    return any(
        "expert" in name and isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) > 1
        for name, child in module.named_children()
    )
