"""Sequence parallelism: the ranks of a group share each packed sequence, for sequences too long for one device.

Each rank runs the model on an equal stretch of the sequence. Only attention looks beyond it. For attention, the ranks
exchange stretches for heads (all-to-all) and back, so each sees the whole sequence with all documents for its share of
the heads (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509; DeepSpeed does the exchange).

DeepSpeed's engine does not know about the groups. It treats a stretch as an ordinary micro-batch: the gradient of a
step is the sum over all ranks, whether they have different sequences or different stretches of the same sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed
from torch.nn.functional import pad
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from snaketune.common.cli import UserError
from snaketune.models.packed_attention import PACKED
from snaketune.models.per_document import run_per_document_kinds
from snaketune.tokenized.bin_reader import IGNORE_INDEX


class SequenceParallel:
    """This rank's place in the group that shares its packed sequences. All ranks must create one together.

    Args:
        size: Ranks per group, with consecutive numbers; 1 disables sequence parallelism.

    Attributes:
        rank: Place in the group, which is the number of this rank's stretch.
    """

    def __init__(self, size: int):
        self.size, self.rank = size, distributed.get_rank() % size
        self.group = self.exchange = None
        if size > 1:
            starts = range(0, distributed.get_world_size(), size)
            groups = [distributed.new_group(list(range(start, start + size))) for start in starts]
            self.group = groups[distributed.get_rank() // size]

    def attach(self, model: PreTrainedModel) -> None:
        """Makes a model's attention exchange stretches for heads, but only for input from `stretch`.

        Raises:
            UserError: The model does not support sequence parallelism of this size.
        """
        if self.size == 1:
            return
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        config, name = model.config.get_text_config(), model.config._attn_implementation
        _check_model(model, config, name, self.size)
        core = ALL_ATTENTION_FUNCTIONS[name]
        if not isinstance(core, _Attention):
            core = _Attention(core)
            AttentionInterface.register(name, core)
        heads = config.num_attention_heads
        self.exchange = UlyssesSPAttentionHF(
            attn=core.alone,
            batch_size=1,
            attn_head_count=heads,
            attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            kv_head_count=getattr(config, "num_key_value_heads", None) or heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=self.group,
            seq_length_is_variable=True,
        )

    def stretch(self, row: dict) -> dict:
        """Returns this rank's stretch of a packed sequence, for `SupervisedFinetune.forward`.

        Args:
            row: `input_ids`, `labels`, `position_ids` (1, length), `cumulative_len` (documents + 1,), `max_seqlen`.

        Returns:
            The same keys: `input_ids` and `position_ids` (1, n) and `labels` (1, n + 1) of the stretch, and the
            boundaries of the whole sequence. The last label is the next rank's first, which the stretch's last token
            predicts. An extra document, which is not trained on, pads the sequence to a multiple of the group's size.
        """
        if self.size == 1:
            return row
        length = row["input_ids"].shape[1]
        missing = -length % self.size
        share = (length + missing) // self.size
        start = self.rank * share
        boundaries, longest = row["cumulative_len"], row["max_seqlen"]
        positions = row["position_ids"]
        if missing:
            positions = torch.cat([positions, torch.arange(missing).to(positions)[None]], dim=1)
            boundaries, longest = torch.cat([boundaries, boundaries[-1:] + missing]), max(longest, missing)
        labels = pad(row["labels"], (0, missing + 1), value=IGNORE_INDEX)
        return {
            **row,
            "input_ids": pad(row["input_ids"], (0, missing))[:, start : start + share],
            "position_ids": positions[:, start : start + share],
            "labels": labels[:, start : start + share + 1],
            "cumulative_len": boundaries,
            "max_seqlen": longest,
            "sequence_parallel": self,
        }

    def attend(self, module: torch.nn.Module, *args, **kwargs) -> tuple[torch.Tensor, None]:
        """Computes a layer's attention over the whole sequence; same interface as transformers' attention functions."""
        repeated = module.__dict__.get("num_key_value_groups")
        output = self.exchange(module, *args, **kwargs)
        if repeated is not None:  # DeepSpeed leaves the per-rank number here when it repeats KV heads
            module.num_key_value_groups = repeated
        return output


class _Attention:
    """A transformers attention function that accepts `sequence_parallel`; without it, the original function runs.

    It is an argument of each call, not global state, because gradient checkpointing calls again in the backward pass.
    """

    def __init__(self, alone: Callable):
        self.alone = alone

    def __call__(self, module, query, key, value, mask, *args, sequence_parallel=None, **kwargs):
        if sequence_parallel is None:
            return self.alone(module, query, key, value, mask, *args, **kwargs)
        # The mask, if any, covers only the stretch. The boundaries decide which tokens are visible.
        return sequence_parallel.attend(module, query, key, value, None, *args, **kwargs)


def _check_model(model: PreTrainedModel, config: PretrainedConfig, attention: str, size: int) -> None:
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    recurrent = ", ".join(each.__name__ for each in run_per_document_kinds(model))
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if not heads or heads % size or (kv_heads % size and size % kv_heads):
        found, expected = f"{heads} heads, {kv_heads} KV heads", "numbers of heads divisible by it"
    elif recurrent:
        found, expected = recurrent, "layers in which tokens interact only through attention"
    elif kinds:
        found, expected = (
            f"layers of type {', '.join(sorted(kinds))}",
            "layers in which tokens interact only through attention",
        )
    elif rope in ("dynamic", "longrope"):
        found, expected = (
            f"rope_type {rope}, which depends on the length of a rank's input",
            "another rope_type",
        )
    elif attention != PACKED and "flash" not in attention:
        found, expected = f"attention {attention}", "sdpa or flash_attention_2"
    else:
        return
    raise UserError(
        f"sequence_parallel = {size} cannot be used with this model",
        found=found,
        expected=expected,
        fix="set sequence_parallel to 1, or to a number that fits the model",
    )
