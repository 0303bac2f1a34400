"""Loss on the assistant's tokens of held-out conversations, each evaluated by itself."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from snaketune.common.progress import Progress
from snaketune.evaluation.heldout import Sample, batches_by_length


@torch.no_grad()  # not inference_mode: training reuses the weights that ZeRO-3 gathers here
def token_losses(model, batch: list[Sample], vocab_size: int) -> list[torch.Tensor]:
    """Returns each sample's losses in nats: one fp32 value per trained token, except the first id of the row.

    Rows are padded on the right. Attention is causal, so real tokens never see padding and no mask is needed. The next
    token is one of the tokenizer's: the base and a model in training may have spare rows, and `hf/` has none.

    Args:
        model: A causal language model in eval mode.
        batch: Samples of similar length.
        vocab_size: Ids of the tokenizer.
    """
    length = max(len(sample.ids) for sample in batch)
    ids = torch.zeros((len(batch), length), dtype=torch.int64)
    predicts = torch.zeros((len(batch), length), dtype=torch.bool)  # position t predicts the id at t + 1
    for row, sample in enumerate(batch):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        predicts[row, : len(sample.ids) - 1] = torch.tensor(sample.trained[1:])
    # Run the head only at positions where some row has a trained token.
    columns = predicts.any(dim=0).nonzero().flatten()
    if not len(columns):
        return [torch.zeros(0) for _ in batch]
    device = model.device
    some = "logits_to_keep" in inspect.signature(model.forward).parameters
    more = {"logits_to_keep": columns.to(device)} if some else {}
    logits = model(input_ids=ids.to(device), use_cache=False, **more).logits
    if not some:
        logits = logits[:, columns.to(device)]
    losses = []
    for row in range(len(batch)):
        wanted = predicts[row, columns]
        targets = ids[row, columns[wanted] + 1]
        picked = logits[row, wanted.to(device), :vocab_size].float()
        losses.append(cross_entropy(picked, targets.to(device), reduction="none").cpu())
    return losses


def score(model, samples: list[Sample], vocab_size: int, batch_tokens: int = 2048) -> dict[str, Any]:
    """Returns loss (nats per trained token), perplexity and counts, overall and by dataset.

    Args:
        model: A causal language model in eval mode.
        samples: Held-out conversations; those without a trained token count as samples but add no loss.
        vocab_size: Ids of the tokenizer.
        batch_tokens: Maximum ids of a padded batch.

    Returns:
        {"loss", "perplexity", "trained_tokens", "samples", "truncated", "datasets": {name: the same five},
        "conversations": {dataset: [[nats, trained tokens], ...] in the order of its samples}}
    """
    nats: dict[int, float] = {}
    sums = dict.fromkeys(sorted({sample.dataset for sample in samples}), 0.0)
    progress = Progress("tokens", sum(len(sample.ids) for sample in samples))
    for batch in batches_by_length(samples, batch_tokens):
        own = add_losses(sums, model, batch, vocab_size)
        nats.update(zip(map(id, batch), own, strict=True))
        progress.add("held-out loss", tokens=sum(len(sample.ids) for sample in batch))
    print(f"held-out loss: {progress.finish()}", flush=True)
    conversations: dict[str, list[list[float]]] = {name: [] for name in sums}
    for sample in samples:
        conversations[sample.dataset].append([nats[id(sample)], sample.targets])
    return summarise(sums, samples) | {"conversations": conversations}


def add_losses(sums: dict[str, float], model, batch: list[Sample], vocab_size: int) -> list[float]:
    """Adds the losses of a batch, in nats, to the sums by dataset; returns the loss of each sample."""
    own = []
    for sample, losses in zip(batch, token_losses(model, batch, vocab_size), strict=True):
        # fp64, so that precision does not depend on the number of tokens.
        own.append(losses.double().sum().item())
        sums[sample.dataset] += own[-1]
    return own


def summarise(sums: dict[str, float], samples: list[Sample]) -> dict[str, Any]:
    """Returns the result of `score`, without `conversations`, from the loss sums by dataset."""
    by_dataset = {
        name: _result(total, [sample for sample in samples if sample.dataset == name])
        for name, total in sums.items()
    }
    return {**_result(math.fsum(sums.values()), samples), "datasets": by_dataset}


def _result(total: float, samples: list[Sample]) -> dict[str, Any]:
    tokens = sum(sample.targets for sample in samples)
    loss = total / tokens if tokens else None
    return {
        "loss": loss,
        # Capped: exp overflows for a model that does not know the format.
        "perplexity": math.exp(min(loss, 700.0)) if loss is not None else None,
        "trained_tokens": tokens,
        "samples": len(samples),
        "truncated": sum(sample.truncated for sample in samples),
    }
