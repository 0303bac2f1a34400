"""DeepSpeed's configuration for a GPU, which no test here can run, and the combinations that are refused."""

from __future__ import annotations

import pytest

from snaketune.common.cli import UserError
from snaketune.training.deepspeed_strategy import deepspeed_settings


def test_a_gpu_gets_bfloat16_overlap_and_pinned_memory():
    settings = deepspeed_settings(3, "auto", "cuda", "all")
    zero = settings["zero_optimization"]
    assert settings["bf16"]["enabled"] and not settings["fp16"]["enabled"]
    assert settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert zero["overlap_comm"] and zero["stage3_gather_16bit_weights_on_model_save"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in deepspeed_settings(2, "auto", "cuda", "optimizer")["zero_optimization"]
    assert not deepspeed_settings(0, "float32", "cuda")["zero_optimization"]["overlap_comm"]


def test_deepspeed_knows_every_setting():
    """Its own checks, for all that is made here; a misspelt name or a wrong value would be refused."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for device in ("cpu", "cuda"):
        for stage, offload in ((0, "none"), (1, "optimizer"), (2, "optimizer"), (3, "all")):
            settings = deepspeed_settings(stage, "float32", device, offload)
            checked = DeepSpeedZeroConfig(**settings["zero_optimization"])
            assert checked.stage == stage
            assert (checked.offload_param is not None) == (offload == "all")


@pytest.mark.parametrize(
    ("stage", "dtype", "device", "offload", "said"),
    [
        (0, "auto", "cuda", "none", "zero_stage 0 cannot train in bfloat16"),
        (0, "bfloat16", "cpu", "none", "set zero_stage to 1"),
        (0, "float32", "cuda", "optimizer", "offload optimizer needs a higher ZeRO stage"),
        (2, "auto", "cuda", "all", "offload all needs a higher ZeRO stage"),
        (3, "auto", "cuda", "nvme", "none, optimizer or all"),
    ],
)
def test_what_does_not_go_together_is_refused(stage, dtype, device, offload, said):
    with pytest.raises(UserError, match=said):
        deepspeed_settings(stage, dtype, device, offload)
