"""The model as the runner sees it: a packed row goes in, one loss comes out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import distributed
from transformers import PreTrainedModel

from snaketune.models.base_model import grow_to_tokenizer
from snaketune.models.cross_entropy import check_cross_entropy, chunked_cross_entropy, loss_in_head
from snaketune.models.device import training_device
from snaketune.models.lora import add_lora, leave_out_frozen
from snaketune.models.packed_attention import check_attention, packing_kwargs
from snaketune.tokenized.bin_reader import IGNORE_INDEX
from snaketune.training.nonfinite_steps import spread_nonfinite


def count_trained_tokens(labels: torch.Tensor) -> int:
    """Returns how many predictions of a row's labels (1, length) are trained: all but the first label can be."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def step_loss_weights(
    trained_tokens: Sequence[int], normalisation: str, device: torch.device, sequence_parallel: int = 1
) -> list[float]:
    """Returns what the sum of token losses of each micro-batch of this rank counts in the loss of the step.

    The loss of an optimizer step is the sum over its ranks and micro-batches of weight x sum of token losses:

    - `token`: the mean over the trained tokens of the whole step, 1 / (trained tokens of all ranks and micro-batches).
      Each token weighs the same, however they are spread over micro-batches and ranks.
    - `micro_batch`: the mean over micro-batches and ranks of their means, as XTuner 0.2.0. A token beside few trained
      ones weighs more than one beside many. (A micro-batch without any counts as 0; XTuner's loss is NaN then.)

    All ranks call it together, once a step, before its first backward pass.

    Args:
        trained_tokens: Of each micro-batch of the step on this rank; of its whole row, where ranks share one.
        normalisation: `token` or `micro_batch`.
        device: Where the ranks' counts are added up.
        sequence_parallel: Ranks that share a row.
    """
    if normalisation == "micro_batch":
        micro_batches = len(trained_tokens) * distributed.get_world_size() // sequence_parallel
        return [1 / (count * micro_batches) if count else 0.0 for count in trained_tokens]
    total = torch.tensor(sum(trained_tokens), dtype=torch.int64, device=device)
    distributed.all_reduce(total)
    return [1 / max(1, int(total) // sequence_parallel)] * len(trained_tokens)


class SupervisedFinetune(BaseModel):
    """Fine-tuning of a causal language model on packed rows, of all its parameters or by LoRA.

    Args:
        llm: A config to build the model from (`type=load_base_model`), or a model.
        tokenizer: Folder of the extended tokenizer: the embedding grows to it. None leaves the model as it is.
        gradient_checkpointing: Recomputes activations in the backward pass instead of keeping them.
        cross_entropy: `chunked`, or `liger` for Liger's kernel on a GPU.
        lora: `rank`, `alpha`, `dropout`, `target_modules`, see `snaketune.models.lora`; None trains all parameters.
    """

    def __init__(
        self,
        llm: dict | PreTrainedModel,
        tokenizer: str | None = None,
        gradient_checkpointing: bool = True,
        cross_entropy: str = "chunked",
        lora: dict | None = None,
    ):
        super().__init__()
        check_cross_entropy(cross_entropy)
        self.cross_entropy = cross_entropy
        base_path = llm.get("model_path") if isinstance(llm, dict) else None
        self.llm = MODELS.build(llm) if isinstance(llm, dict) else llm
        self.llm.config.use_cache = False
        check_attention(self.llm.config._attn_implementation, training_device())
        new_ids, _ = grow_to_tokenizer(self.llm, tokenizer, base_path)
        if lora is not None:
            add_lora(self.llm, lora, new_ids)
            leave_out_frozen(self.llm)
        if gradient_checkpointing:
            self.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._selects_logits = "logits_to_keep" in inspect.signature(self.llm.forward).parameters
        self._loss_in_head: bool | None = None  # False for a model that scales or caps its logits; asked once

    def init_weights(self) -> None:
        """Every rank loads the same weights: nothing to initialise."""

    def forward(self, data: dict, data_samples: None = None, mode: str = "loss") -> dict[str, torch.Tensor]:
        """Returns {"loss": float64 scalar} for one packed row: the sum of its token losses x `loss_weight`.

        Labels shift over the whole row, as in XTuner: position t predicts the label at t + 1. The last token of a
        document therefore predicts the first of the next, whose label (BOS) XTuner stores as trained; the first
        token of a row is predicted by none. Without any trained token the loss is 0, with a gradient of 0.

        Args:
            data: `input_ids`, `labels`, `position_ids` (1, length), `cumulative_len` (documents + 1,), `max_seqlen`;
                `loss_weight`, see `step_loss_weights`; without it the loss is the mean over the row's trained tokens.
                Or this rank's part of a row, as `SequenceParallel.stretch` returns it.
        """
        if mode != "loss":
            raise NotImplementedError(f"mode {mode!r}: this model only trains")
        targets = data["labels"][0, 1:]
        # The head runs where a token is trained only: same loss and gradient, and no logits for the masked rest.
        kept = (targets != IGNORE_INDEX).nonzero().flatten()
        weight = data.get("loss_weight", 1 / max(1, len(kept)))
        if not len(kept):  # one position, so that every rank and parameter takes part in the backward pass
            kept, targets, weight = kept.new_zeros(1), targets.new_zeros(1), 0.0
        inputs = {
            "input_ids": data["input_ids"],
            "position_ids": data["position_ids"],
            "use_cache": False,
            **packing_kwargs(data["cumulative_len"], data.get("max_seqlen")),
        }
        if "sequence_parallel" in data:
            inputs["sequence_parallel"] = data["sequence_parallel"]
        return {"loss": spread_nonfinite(self._summed_loss(inputs, kept, targets[kept]) * weight)}

    def _summed_loss(self, inputs: dict, kept: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self._loss_in_head is None:
            self._loss_in_head = self._takes_loss_for_logits(kept.device)
        if self._loss_in_head:
            return self._run_with_loss_in_head(inputs, kept, targets)
        selection = {"logits_to_keep": kept} if self._selects_logits else {}
        logits = self.llm(**inputs, **selection).logits[0]
        if not self._selects_logits:
            logits = logits[kept]
        return chunked_cross_entropy(logits, targets, logits.shape[1])

    def _run_with_loss_in_head(self, inputs: dict, kept: torch.Tensor, targets: torch.Tensor):
        vocabulary = self.llm.config.get_text_config().vocab_size
        head = self.llm.get_output_embeddings()
        with loss_in_head(head, kept, targets, vocabulary, self.cross_entropy) as loss:
            return loss.read(self.llm(**inputs).logits)

    def _takes_loss_for_logits(self, device: torch.device) -> bool:
        """Tells from a row of two tokens whether the model hands on what its head returns, as it is."""
        if self.llm.get_output_embeddings() is None:
            return False
        row = torch.arange(2, device=device)[None]
        inputs = {"input_ids": row, "position_ids": row, "use_cache": False}
        inputs |= packing_kwargs(torch.tensor([0, 2], device=device), 2)
        # Dropout must draw the same numbers in a resumed run, which asks later.
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            return self._run_with_loss_in_head(inputs, row[0, :1], row[0, 1:]) is not None
