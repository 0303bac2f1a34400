"""A rank's stretch of a packed sequence, and models that cannot be shared. For training, see test_train_parity.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BambaConfig, LlamaConfig, Qwen3NextConfig

from snaketune.common.cli import UserError
from snaketune.models.base_model import fit_attention
from snaketune.models.packed_attention import PACKED
from snaketune.models.sequence_parallel import SequenceParallel
from snaketune.models.twin import build
from snaketune.training.packed_data import packed_collate


def place(size: int, rank: int) -> SequenceParallel:
    """A place in a group, without processes to exchange with."""
    shared = object.__new__(SequenceParallel)
    shared.size, shared.rank = size, rank
    return shared


def llama(**settings) -> LlamaConfig:
    return LlamaConfig(hidden_size=72, **settings)


@pytest.mark.parametrize("lengths", [(5, 3, 4), (5, 2), (1,), (7, 1, 6)])
def test_stretches_make_the_row(lengths):
    size, count = 4, sum(lengths)
    ids = np.arange(10, 10 + count)
    row = packed_collate(
        [
            {
                "input_ids": ids,
                "labels": np.where(ids % 3, ids, -100),
                "position_ids": np.concatenate([np.arange(length) for length in lengths]),
                "cumulative_len": np.cumsum([0, *lengths]),
            }
        ]
    )["data"]
    parts = [place(size, rank).stretch(row) for rank in range(size)]
    for name in ("input_ids", "position_ids"):
        whole = torch.cat([part[name] for part in parts], dim=1)
        assert torch.equal(whole[:, :count], row[name]) and whole.shape[1] % size == 0
    # The prediction at each position, including the boundaries between ranks; padding predicts nothing.
    predicted = torch.cat([part["labels"][:, 1:] for part in parts], dim=1)[0].tolist()
    assert predicted == row["labels"][0, 1:].tolist() + [-100] * (len(predicted) - count + 1)
    for part in parts:
        boundaries = part["cumulative_len"].tolist()
        assert boundaries[: len(lengths) + 1] == row["cumulative_len"].tolist() and boundaries[-1] == len(
            predicted
        )
        assert part["max_seqlen"] == max(np.diff(boundaries))


@pytest.mark.parametrize(
    ("config", "attention", "said"),
    [
        (llama(num_attention_heads=9, num_key_value_heads=3), PACKED, "9 heads, 3 KV heads"),
        (llama(num_attention_heads=12, num_key_value_heads=3), PACKED, "12 heads, 3 KV heads"),
        (llama(num_attention_heads=4), "eager", "attention eager"),
        (
            llama(num_attention_heads=4, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
            PACKED,
            "rope_type dynamic",
        ),
        (Qwen3NextConfig(), PACKED, "layers of type linear_attention"),
    ],
)
def test_models_that_cannot_be_shared_are_refused(config, attention, said):
    config._attn_implementation = attention
    model = torch.nn.Module()
    model.config = config
    with pytest.raises(UserError, match="sequence_parallel = 4 cannot be used with this model") as error:
        place(4, 0).attach(model)
    assert said in str(error.value)


def test_layers_that_carry_state_are_refused():
    """A rank's stretch starts within a document. Bamba's config has no types of layers."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
    config = BambaConfig(
        **sizes, num_hidden_layers=2, mamba_n_heads=8, mamba_d_state=8, attn_layer_indices=[1]
    )
    model = fit_attention("auto", "cpu", lambda name: build(config, name, trust_remote_code=False))
    with pytest.raises(UserError, match="sequence_parallel = 4 cannot be used with this model") as error:
        place(4, 0).attach(model)
    assert "BambaMixer" in str(error.value)
