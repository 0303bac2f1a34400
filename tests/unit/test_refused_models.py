"""Models that cannot be trained are refused in words; a fault of ours keeps its traceback."""

from __future__ import annotations

import pytest
import torch
from test_router_loss import SIZES, row
from transformers import AutoConfig, AutoModelForCausalLM

from module_experts import ModuleExpertsConfig, ModuleExpertsForCausalLM
from snaketune.common.cli import UserError
from snaketune.preflight.check import attempt
from snaketune.preflight.checks import check_dtypes
from snaketune.training.deepspeed_strategy import DeepSpeedStrategy, deepspeed_settings
from snaketune.training.expert_modules import use_experts_together
from snaketune.training.packed_data import packed_collate
from snaketune.training.supervised_finetune import SupervisedFinetune


def test_an_error_of_the_models_own_code_is_a_message_with_the_traceback_in_the_log(capsys):
    settings = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "num_experts": 2,
        "decoder_sparse_step": 2,
    }
    settings |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "moe_intermediate_size": 16}
    config = AutoConfig.for_model("qwen3_next", **SIZES, **settings, num_experts_per_tok=1)
    model = SupervisedFinetune(AutoModelForCausalLM.from_config(config, attn_implementation="packed"))
    with pytest.raises(
        UserError, match=r"(?s)Qwen3NextForCausalLM cannot be trained.*its own code fails"
    ) as caught:
        model.train()(**packed_collate([row()]))
    assert type(caught.value.__cause__).__name__ in str(caught.value)
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_our_own_code_is_raised_as_it_is(monkeypatch):
    def broken(*_):
        raise ValueError("a fault of ours")

    model = SupervisedFinetune(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)))
    monkeypatch.setattr("snaketune.models.cross_entropy.linear_cross_entropy", broken)
    with pytest.raises(ValueError, match="a fault of ours"):
        model.train()(**packed_collate([row()]))


def test_a_model_that_cannot_recompute_activations():
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    config = AutoConfig.for_model("jetmoe", **sizes, kv_channels=8, num_local_experts=2)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        UserError, match=r"(?s)JetMoeForCausalLM cannot recompute.*set train.gradient_checkpointing: false"
    ):
        SupervisedFinetune(model)
    SupervisedFinetune(model, gradient_checkpointing=False)


def test_a_gpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100-SXM2-32GB")
    for dtype in ("auto", "bfloat16"):
        with pytest.raises(UserError, match=r"(?s)V100.*cannot train in bfloat16.*train.dtype to float16"):
            DeepSpeedStrategy(zero_stage=2, dtype=dtype, gradient_clipping=1.0, sequence_parallel=1)
    told = attempt("dtype", lambda: check_dtypes(["float16", "auto"]))
    assert not told.passed and "V100" in told.found and "float16" in told.fix
    assert check_dtypes(["float16"]).passed
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert check_dtypes(["auto"]).found == "bfloat16"


@pytest.mark.parametrize("stage", [1, 2])
def test_experts_as_modules_on_several_ranks(stage):
    model = ModuleExpertsForCausalLM(ModuleExpertsConfig(**SIZES))
    with pytest.raises(UserError, match=rf"(?s)Mixture, zero_stage {stage}, 2 ranks.*train.zero_stage to 3"):
        use_experts_together(model, stage, 2)
    use_experts_together(model, stage, 1)
    use_experts_together(AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES)), stage, 2)


def test_float16_on_a_cpu():
    with pytest.raises(UserError, match=r"(?s)a CPU cannot train in float16.*float32"):
        DeepSpeedStrategy(zero_stage=2, dtype="float16", gradient_clipping=1.0, sequence_parallel=1)


def test_stage_0_in_16_bits_is_refused():
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(UserError, match=f"zero_stage 0 cannot train in {dtype}"):
            deepspeed_settings(0, dtype, "cpu")
