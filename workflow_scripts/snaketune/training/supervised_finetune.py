"""The model that the runner trains: maps a packed sequence to a loss."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import distributed
from transformers import PreTrainedModel

from snaketune.common.cli import UserError
from snaketune.models.base_model import (
    grow_to_tokenizer,
    make_constants_buffers,
    weights_kept_in_float32,
)
from snaketune.models.cross_entropy import check_cross_entropy, chunked_cross_entropy, loss_in_head
from snaketune.models.device import training_device
from snaketune.models.documents import checkpoint_contexts
from snaketune.models.expert_load import ExpertLoad
from snaketune.models.lora import add_lora, describe_lora, leave_out_frozen
from snaketune.models.packed_attention import check_attention, packing_kwargs
from snaketune.models.router_loss import describe_router_loss, router_coefficient, router_inputs
from snaketune.settings.schema import default_of
from snaketune.tokenized.bin_reader import IGNORE_INDEX
from snaketune.training.first_forward import refuse_unsupported
from snaketune.training.nonfinite_steps import spread_nonfinite


def count_trained_tokens(labels: torch.Tensor) -> int:
    """Returns the number of trained predictions in labels (1, length). No token predicts the first label."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def step_loss_weights(
    trained_tokens: Sequence[int],
    normalisation: str,
    device: torch.device,
    sequence_parallel: int = default_of("train.sequence_parallel"),
) -> list[float]:
    """Returns the weight of each of this rank's micro-batches in the loss of the step.

    The loss of an optimizer step is the sum over ranks and micro-batches of weight x sum of token losses:

    - `token`: the mean over the trained tokens of the whole step, so the weight is 1 / (trained tokens of all
      ranks and micro-batches). All tokens count the same, however they are spread over micro-batches and
      ranks.
    - `micro_batch`: the mean over micro-batches and ranks of their mean losses, as in XTuner 0.2.0. A token
      counts more the fewer trained tokens its micro-batch has. (A micro-batch without trained tokens counts
      as 0; XTuner's loss is then NaN.)

    All ranks call it together, once per step, before the first backward pass.

    Args:
        trained_tokens: Trained tokens in each of this rank's micro-batches; of the whole packed sequence if
            ranks share it.
        normalisation: `token` or `micro_batch`.
        device: Device for summing the counts of the ranks.
        sequence_parallel: Ranks that share a packed sequence.
    """
    if normalisation == "micro_batch":
        micro_batches = len(trained_tokens) * distributed.get_world_size() // sequence_parallel
        return [1 / (count * micro_batches) if count else 0.0 for count in trained_tokens]
    total = torch.tensor(sum(trained_tokens), dtype=torch.int64, device=device)
    distributed.all_reduce(total)
    return [1 / max(1, int(total) // sequence_parallel)] * len(trained_tokens)


def step_row_weights(row_tokens: Sequence[int], normalisation: str, device: torch.device) -> list[float]:
    """Returns the weight of each of this rank's packed sequences in the router's auxiliary loss of the step.

    The router's loss of a step is the sum over its packed sequences of weight x the loss of that sequence, over all its
    tokens, as transformers computes it for a batch with one row. So a packed sequence is the unit in which the
    load is balanced. Ranks and micro-batches do not change it: the pack plan decides which documents share one.

    - `token`: the weight is the sequence's share of the tokens of the step, over all ranks and micro-batches.
    - `micro_batch`: the mean over the packed sequences of the step.

    All ranks call it together, once per step, before the first backward pass.

    Args:
        row_tokens: Tokens in each of this rank's packed sequences.
        normalisation: `token` or `micro_batch`.
        device: Device for summing the counts of the ranks.
    """
    if normalisation == "micro_batch":
        return [1 / (len(row_tokens) * distributed.get_world_size())] * len(row_tokens)
    total = torch.tensor(sum(row_tokens), dtype=torch.int64, device=device)
    distributed.all_reduce(total)
    return [tokens / int(total) for tokens in row_tokens]


class SupervisedFinetune(BaseModel):
    """Fine-tunes a causal language model on packed sequences: all its parameters, or with LoRA.

    Args:
        llm: A config to build the model from (`type=load_base_model`), or a model.
        tokenizer: Folder of the extended tokenizer, which the embedding grows to fit. None leaves the model
            unchanged.
        gradient_checkpointing: True recomputes activations in the backward pass instead of storing them.
        cross_entropy: `chunked`, or `liger` for Liger's kernel on a GPU.
        lora: `rank`, `alpha`, `dropout`, `target_modules`, `experts`, see `snaketune.models.lora`; None trains all
            parameters.
        router_aux_loss: Coefficient of the router's auxiliary loss; None follows the base's config, see
            `snaketune.models.router_loss`.

    Attributes:
        router_aux_loss: The coefficient that applies; 0 adds no such loss.
        expert_load: The tokens that each expert got, see `snaketune.models.expert_load`.
    """

    def __init__(
        self,
        llm: dict | PreTrainedModel,
        tokenizer: str | None = None,
        gradient_checkpointing: bool = default_of("train.gradient_checkpointing"),
        cross_entropy: str = default_of("train.cross_entropy"),
        lora: dict | None = None,
        router_aux_loss: float | None = default_of("train.router_aux_loss"),
    ):
        super().__init__()
        check_cross_entropy(cross_entropy)
        self.cross_entropy = cross_entropy
        base_path = llm.get("model_path") if isinstance(llm, dict) else None
        self.llm = MODELS.build(llm) if isinstance(llm, dict) else llm
        self.llm.config.use_cache = False
        check_attention(self.llm.config._attn_implementation, training_device())
        new_ids, _ = grow_to_tokenizer(self.llm, tokenizer, base_path)
        make_constants_buffers(self.llm)
        _say(_describe_rounding(self.llm))
        self.router_aux_loss = router_coefficient(self.llm, router_aux_loss)
        _say(describe_router_loss(self.llm, self.router_aux_loss, router_aux_loss))
        self._router_inputs = router_inputs(self.llm, self.router_aux_loss)
        if lora is not None:
            add_lora(self.llm, lora, new_ids)
            leave_out_frozen(self.llm)
            _say(describe_lora(self.llm))
        self.expert_load = ExpertLoad(self.llm)
        if gradient_checkpointing:
            _check_checkpointing(self.llm)
            self.llm.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts}
            )
        self._selects_logits = "logits_to_keep" in inspect.signature(self.llm.forward).parameters
        self._loss_in_head: bool | None = None  # False if the model scales or caps its logits; checked once
        self._has_run = False

    def init_weights(self) -> None:
        """Does nothing: every rank loads the same weights."""

    def forward(self, data: dict, data_samples: None = None, mode: str = "loss") -> dict[str, torch.Tensor]:
        """Returns {"loss": float64 scalar} for a packed sequence: its summed token losses x `loss_weight`.

        With a router's auxiliary loss also {"aux_loss": scalar}: its coefficient x the loss x `aux_weight`. mmengine
        trains on the sum.

        Labels shift over the whole packed sequence, as in XTuner: position t predicts the label at t + 1. So
        the last token of a document predicts the first token of the next, whose label (BOS) XTuner stores as
        trained. No token predicts the first token of the packed sequence. Without trained tokens, the loss
        and its gradient are 0.

        Args:
            data: `input_ids`, `labels`, `position_ids` (1, length), `cumulative_len` (documents + 1,),
                `max_seqlen`, `loss_weight`, see `step_loss_weights`, and `aux_weight`, see `step_row_weights`;
                without them, the losses are means over the packed sequence. Or this rank's part of a packed
                sequence, as returned by `SequenceParallel.stretch`.
        """
        if mode != "loss":
            raise NotImplementedError(f"mode {mode!r}: this model only trains")
        targets = data["labels"][0, 1:]
        # Run the head only on trained tokens: same loss and gradient, without logits for masked tokens.
        kept = (targets != IGNORE_INDEX).nonzero().flatten()
        weight = data.get("loss_weight", 1 / max(1, len(kept)))
        if not len(kept):  # keep one, so that every rank and parameter takes part in the backward pass
            kept, targets, weight = kept.new_zeros(1), targets.new_zeros(1), 0.0
        inputs = {
            "input_ids": data["input_ids"],
            "position_ids": data["position_ids"],
            "use_cache": False,
            **self._router_inputs,
            **packing_kwargs(data["cumulative_len"], data.get("max_seqlen")),
        }
        if "sequence_parallel" in data:
            inputs["sequence_parallel"] = data["sequence_parallel"]
        with nullcontext() if self._has_run else refuse_unsupported(self.llm):
            loss, aux_loss = self._summed_loss(inputs, kept, targets[kept])
        self._has_run = True
        losses = {"loss": spread_nonfinite(loss * weight)}
        if self.router_aux_loss:
            weight = self.router_aux_loss * data.get("aux_weight", 1.0)
            losses["aux_loss"] = spread_nonfinite(aux_loss * weight)
        return losses

    def _summed_loss(self, inputs: dict, kept: torch.Tensor, targets: torch.Tensor) -> tuple:
        """Returns (summed token losses, the router's loss or None)."""
        if self._loss_in_head is None:
            self._loss_in_head = self._takes_loss_for_logits(kept.device)
        with self.expert_load.count():
            if self._loss_in_head:
                return self._run_with_loss_in_head(inputs, kept, targets)
            selection = {"logits_to_keep": kept} if self._selects_logits else {}
            outputs = self.llm(**inputs, **selection)
        logits = outputs.logits[0]
        if not self._selects_logits:
            logits = logits[kept]
        return chunked_cross_entropy(logits, targets, logits.shape[1]), outputs.get("aux_loss")

    def _run_with_loss_in_head(self, inputs: dict, kept: torch.Tensor, targets: torch.Tensor) -> tuple:
        vocabulary = self.llm.config.get_text_config().vocab_size
        head = self.llm.get_output_embeddings()
        with loss_in_head(head, kept, targets, vocabulary, self.cross_entropy) as loss:
            outputs = self.llm(**inputs)
            return loss.read(outputs.logits), outputs.get("aux_loss")

    def _takes_loss_for_logits(self, device: torch.device) -> bool:
        """True if the model returns the output of its head unchanged. Tests it on two tokens."""
        if self.llm.get_output_embeddings() is None:
            return False
        row = torch.arange(2, device=device)[None]
        inputs = {"input_ids": row, "position_ids": row, "use_cache": False}
        # Keep the random state: a resumed run tests this at a later step, but needs the same dropout.
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            return self._run_with_loss_in_head(inputs, row[0, :1], row[0, 1:])[0] is not None


def _say(text: str | None) -> None:
    if text and (not distributed.is_initialized() or distributed.get_rank() == 0):
        print(text, flush=True)


def _describe_rounding(model: PreTrainedModel) -> str | None:
    """Returns a warning if DeepSpeed rounds weights that transformers would keep in float32."""
    rounded = dict(model.named_parameters()).keys() & set(weights_kept_in_float32(model))
    if not rounded or model.dtype not in (torch.bfloat16, torch.float16):
        return None
    kinds = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in rounded}))
    return (
        f"Computes {len(rounded)} weights in {str(model.dtype).removeprefix('torch.')} that transformers keeps in float32; "
        f"checkpoints and hf/ have their float32 copies: {kinds}"
    )


def _check_checkpointing(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__} cannot recompute its activations",
            found="train.gradient_checkpointing: true",
            expected="false for this model; it then takes more memory",
            fix="set train.gradient_checkpointing: false",
        )
