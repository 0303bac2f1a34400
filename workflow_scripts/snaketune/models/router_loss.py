"""The auxiliary loss of a mixture of experts, which keeps its router from sending all tokens to a few experts.

Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6): experts x sum over experts of the share of
tokens that an expert gets x its mean probability, over all layers and tokens. transformers computes it in the model's
forward pass, as `aux_loss`; it is the number of experts per token if all experts get the same share.
"""

from __future__ import annotations

import inspect
import sys

from transformers import PreTrainedModel

from snaketune.common.cli import UserError

_NEEDED = ("output_router_logits", "load_balancing_loss_func")


def router_coefficient(model: PreTrainedModel, asked: float | None) -> float:
    """Returns what the router's loss is multiplied by before it is added to the loss; 0 adds none.

    Args:
        model: The base model.
        asked: `train.router_aux_loss`. None follows the base's config: `router_aux_loss_coef` if
            `output_router_logits` is true, as transformers does when it trains.

    Raises:
        UserError: A coefficient was asked for, and the model has no such loss.
    """
    config = model.config.get_text_config()
    wanted = asked
    if wanted is None:
        wants = getattr(config, "output_router_logits", False)
        wanted = (getattr(config, "router_aux_loss_coef", None) or 0.0) if wants else 0.0
    if not wanted or _has_router_loss(model):
        return float(wanted)
    if asked is not None:
        raise UserError(
            f"{type(model).__name__} has no auxiliary loss for a router",
            found=f"train.router_aux_loss: {asked}",
            expected="a mixture of experts for which transformers has one, such as Mixtral or Qwen3-MoE",
            fix="set train.router_aux_loss to null",
        )
    return 0.0


def router_inputs(model: PreTrainedModel, coefficient: float) -> dict[str, bool]:
    """Returns the argument of the model's forward pass that turns the computation of the router's loss on or off."""
    return {"output_router_logits": coefficient > 0} if _has_router_loss(model) else {}


def describe_router_loss(model: PreTrainedModel, coefficient: float, asked: float | None) -> str | None:
    """Returns what a run says about the router's loss; None if the base model asks for none."""
    wants = getattr(model.config.get_text_config(), "output_router_logits", False)
    if coefficient:
        source = "the base model's config" if asked is None else "train.router_aux_loss"
        return f"Adds {coefficient:g} x the router's auxiliary loss, as {source} asks"
    if not wants:
        return None
    if asked is None and not _has_router_loss(model):
        return f"Adds no auxiliary loss of the router: transformers has none for {type(model).__name__}"
    return "Adds no auxiliary loss of the router, although the base model's config has output_router_logits: true"


def _has_router_loss(model: PreTrainedModel) -> bool:
    known = {*inspect.signature(model.forward).parameters, *vars(sys.modules[type(model).__module__])}
    return all(name in known for name in _NEEDED)
