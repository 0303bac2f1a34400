"""Sequence parallelism: the ranks of a group share the tokens of each row, for rows too long for one device.

Each rank takes an equal stretch of the row through the model. Only attention looks beyond it: there the ranks exchange
stretches for heads (all-to-all), so that each sees the whole row, documents and all, for its share of the heads, and back
again (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509; the exchange is DeepSpeed's).

DeepSpeed's engine is told nothing about the groups. To it a stretch is a micro-batch like any other: the gradient of a
step is the sum over all ranks, whether they hold other rows or other stretches of one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed
from torch.nn.functional import pad
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from snaketune.common.cli import UserError
from snaketune.models.packed_attention import PACKED_SDPA
from snaketune.tokenized.bin_reader import IGNORE_INDEX


class SequenceParallel:
    """This rank's place in the group that shares its rows. All ranks make one together.

    Args:
        size: Ranks of a group, neighbours by their number; 1 shares nothing.

    Attributes:
        rank: Place in the group: which stretch of a row is this rank's.
    """

    def __init__(self, size: int):
        self.size, self.rank = size, distributed.get_rank() % size
        self.group = self.exchange = None
        if size > 1:
            starts = range(0, distributed.get_world_size(), size)
            groups = [distributed.new_group(list(range(start, start + size))) for start in starts]
            self.group = groups[distributed.get_rank() // size]

    def attach(self, model: PreTrainedModel) -> None:
        """Makes a model's attention exchange stretches for heads, for the rows that `stretch` cut, and only for these.

        Raises:
            UserError: The model cannot be shared among the ranks of a group.
        """
        if self.size == 1:
            return
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        config, name = model.config.get_text_config(), model.config._attn_implementation
        _check_model(config, name, self.size)
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
        """Returns this rank's part of a packed row, for `SupervisedFinetune.forward`.

        Args:
            row: `input_ids`, `labels`, `position_ids` (1, length), `cumulative_len` (documents + 1,), `max_seqlen`.

        Returns:
            The same with the stretch's `input_ids` and `position_ids` (1, n), its `labels` (1, n + 1), and the boundaries of
            the whole row. The label after the stretch is what its last token predicts: the first of the next rank's.
            The row is filled up to a multiple of the group's size with a document of its own, of which nothing is trained.
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
        """Attention of one layer over the whole row; takes and returns what transformers' attention functions do."""
        repeated = module.__dict__.get("num_key_value_groups")
        output = self.exchange(module, *args, **kwargs)
        if repeated is not None:  # DeepSpeed leaves the number within a rank, when it repeats KV heads
            module.num_key_value_groups = repeated
        return output


class _Attention:
    """An attention function of transformers that may be given `sequence_parallel`; without it, it is as it was.

    The argument comes with each call, not from a switch: gradient checkpointing calls again in the backward pass.
    """

    def __init__(self, alone: Callable):
        self.alone = alone

    def __call__(self, module, query, key, value, mask, *args, sequence_parallel=None, **kwargs):
        if sequence_parallel is None:
            return self.alone(module, query, key, value, mask, *args, **kwargs)
        # The mask, if any, is for the stretch alone; the boundaries of the documents say what is to be seen.
        return sequence_parallel.attend(module, query, key, value, None, *args, **kwargs)


def _check_model(config: PretrainedConfig, attention: str, size: int) -> None:
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if not heads or heads % size or (kv_heads % size and size % kv_heads):
        found, expected = f"{heads} heads, {kv_heads} KV heads", "numbers of heads that it divides"
    elif kinds:
        found, expected = (
            f"layers of type {', '.join(sorted(kinds))}",
            "layers whose tokens meet in attention only",
        )
    elif rope in ("dynamic", "longrope"):
        found, expected = f"rope_type {rope}, which depends on the length of what a rank sees", "another one"
    elif attention != PACKED_SDPA and "flash" not in attention:
        found, expected = f"attention {attention}", "sdpa or flash_attention_2"
    else:
        return
    raise UserError(
        f"sequence_parallel = {size} cannot be used with this model",
        found=found,
        expected=expected,
        fix="set sequence_parallel to 1, or to a number that fits the model",
    )
