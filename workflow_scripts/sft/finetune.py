"""The model as the runner sees it: a packed row goes in, one loss comes out."""

from __future__ import annotations

import inspect

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sft.attention import packing_kwargs
from sft.model import resize_for_tokenizer
from sft.tokenizer_rows import find_new_tokens

IGNORE_INDEX = -100


def mean_over_micro_batch(token_losses: torch.Tensor) -> torch.Tensor:
    """Reduces the losses of a micro-batch's trained tokens (n,) to what is back-propagated: their mean, as XTuner.

    DeepSpeed then takes the mean over micro-batches and ranks, so a token of a micro-batch with few trained tokens
    weighs more than one of a micro-batch with many.
    """
    return token_losses.mean()


class SupervisedFinetune(BaseModel):
    """Full-parameter fine-tuning of a causal language model on packed rows.

    Args:
        llm: A config to build the model from (`type=load_base_model`), or a model.
        tokenizer: Folder of the extended tokenizer: the embedding grows to it. None leaves the model as it is.
        gradient_checkpointing: Recomputes activations in the backward pass instead of keeping them.
    """

    def __init__(
        self, llm: dict | PreTrainedModel, tokenizer: str | None = None, gradient_checkpointing: bool = True
    ):
        super().__init__()
        base_path = llm.get("model_path") if isinstance(llm, dict) else None
        self.llm = MODELS.build(llm) if isinstance(llm, dict) else llm
        self.llm.config.use_cache = False
        if tokenizer is not None:
            vocab_size, new_ids = find_new_tokens(tokenizer, base_path)
            resize_for_tokenizer(self.llm, vocab_size, new_ids)
        if gradient_checkpointing:
            self.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._selects_logits = "logits_to_keep" in inspect.signature(self.llm.forward).parameters

    def init_weights(self) -> None:
        """Every rank loads the same weights: nothing to initialise."""

    def forward(self, data: dict, data_samples: None = None, mode: str = "loss") -> dict[str, torch.Tensor]:
        """Returns {"loss": scalar} for one packed row.

        Labels shift over the whole row, as in XTuner: position t predicts the label at t + 1. The last token of a
        document therefore predicts the first of the next, whose label (BOS) XTuner stores as trained; the first
        token of a row is predicted by none. Without any trained token the loss is 0, with a gradient of 0.

        Args:
            data: `input_ids`, `labels`, `position_ids` (1, length), `cumulative_len` (documents + 1,), `max_seqlen`.
        """
        if mode != "loss":
            raise NotImplementedError(f"mode {mode!r}: this model only trains")
        targets = data["labels"][0, 1:]
        predictors = (targets != IGNORE_INDEX).nonzero().flatten()
        # The head runs where a token is trained only: same loss and gradient, and no logits for the masked rest.
        kept = predictors if len(predictors) else predictors.new_zeros(1)
        logits = self.llm(
            input_ids=data["input_ids"],
            position_ids=data["position_ids"],
            use_cache=False,
            **({"logits_to_keep": kept} if self._selects_logits else {}),
            **packing_kwargs(data["cumulative_len"], data.get("max_seqlen")),
        ).logits[0]
        if not self._selects_logits:
            logits = logits[kept]
        if not len(predictors):
            return {"loss": logits.float().sum() * 0.0}
        token_losses = cross_entropy(logits.float(), targets[predictors], reduction="none")
        return {"loss": mean_over_micro_batch(token_losses)}
