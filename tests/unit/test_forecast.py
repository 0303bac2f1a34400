"""Run forecasts: against the ZeRO paper, against measured processes, and for impossible runs."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import AutoConfig

from pack_samples import write_bin
from snaketune.common.cli import UserError
from snaketune.export.hf_tensors import empty_model
from snaketune.models.positions import Positions, read_positions
from snaketune.packing.pack_plan import open_plan
from snaketune.packing.planner import make_plan
from snaketune.preflight.memory_forecast import MIB, Shape, _widths, process_memory, read_shape
from snaketune.preflight.run_forecast import make_run_plan
from snaketune.preflight.sizes import count_parameters


def states(shape, stage, ranks, offload="none"):
    """Returns GB of weights, gradients and optimizer on one GPU in bfloat16."""
    parts = process_memory(
        shape,
        dtype_bytes=2,
        zero_stage=stage,
        offload=offload,
        ranks=ranks,
        row_tokens=4096,
        gradient_checkpointing=True,
        on_gpu=True,
    )["parts"]
    return sum(parts[name] for name in ("weights", "gradients", "optimizer")) / 1e9


def test_the_states_are_those_of_the_zero_paper():
    """Figure 1 of arXiv 1910.02054: 7.5 billion parameters on 64 GPUs take 31.4, 16.6 and 1.9 GB.

    We sum gradients in fp32 from stage 2 on: 2 more bytes per parameter of a GPU's share, 0.23 GB.
    """
    shape = Shape(7_500_000_000, 7_500_000_000, 32, 4096, 4096, 4096, 16384, 50000)
    assert states(shape, 1, 64) == pytest.approx(31.4, abs=0.05)
    assert states(shape, 2, 64) == pytest.approx(16.6 + 0.23, abs=0.1)
    assert states(shape, 3, 64) == pytest.approx(1.9 + 0.23, abs=0.1)
    assert states(shape, 3, 64, "optimizer") < 1 < states(shape, 2, 64, "optimizer") < states(shape, 2, 64)


@pytest.mark.parametrize(
    ("shape", "row_tokens", "checkpointing", "measured_mib"),
    [
        # Demo: peak reported by the kernel. SmolLM2-135M: max_rss of a benchmark file. Both ZeRO-2, one
        # process.
        (Shape(8_503_936, 8_503_936, 2, 128, 128, 64, 256, 32064), 512, True, 956),
        (Shape(134_517_312, 134_517_312, 30, 576, 576, 192, 1536, 49216), 512, False, 4272),
    ],
    ids=["demo", "smollm2"],
)
def test_measured_processes_are_within_15_percent(shape, row_tokens, checkpointing, measured_mib):
    need = process_memory(
        shape,
        dtype_bytes=4,
        zero_stage=2,
        row_tokens=row_tokens,
        gradient_checkpointing=checkpointing,
        on_gpu=False,
    )
    assert need["host"] == 0 and sum(need["parts"].values()) == pytest.approx(need["device"], abs=8)
    assert need["device"] / MIB == pytest.approx(measured_mib, rel=0.15)


def test_offloading_moves_bytes_to_the_host():
    shape = Shape(7_000_000_000, 7_000_000_000, 32, 4096, 4096, 1024, 14336, 32064)
    common = {
        "dtype_bytes": 2,
        "ranks": 8,
        "row_tokens": 32768,
        "gradient_checkpointing": True,
        "on_gpu": True,
    }
    whole, optimizer, everything = (
        process_memory(shape, zero_stage=3, offload=offload, **common)
        for offload in ("none", "optimizer", "all")
    )
    assert whole["host"] == 0 < optimizer["host"] < everything["host"]
    assert whole["device"] > optimizer["device"] > everything["device"]


POSITIONS = Positions(limit=50, learned=False, window=25)


def test_steps_hours_and_what_fits(tmp_path):
    folder = tmp_path / "train"
    write_bin(folder / "cn" / "d" / "a.bin", [[1] * 60, [2] * 30, [3] * 20] * 20)
    make_plan(folder, ["cn/d/a.bin"], 64).write(tmp_path / "plan")
    rows = len(open_plan(tmp_path / "plan"))
    train = {
        "global_batch": None,
        "accumulative_counts": 2,
        "max_steps": None,
        "max_epochs": 3,
        "dtype": "auto",
        "processes": None,
        "sequence_parallel": 2,
        "gradient_checkpointing": True,
        "zero_stage": 2,
        "offload": "none",
        "save_optimizer": True,
        "save_total_limit": 2,
    }
    shape = Shape(7_000_000_000, 7_000_000_000, 32, 4096, 4096, 1024, 14336, 32064)
    options = {"gpus": 8, "device_gib": 40, "tokens_per_second": 100.0}
    plan = make_run_plan({"train": train}, tmp_path / "plan", shape, POSITIONS, **options)
    # Each of four pairs of GPUs reads two packed sequences per step.
    assert plan["steps"] == 3 * rows // 8 and plan["ranks"] == 8
    assert plan["tokens"] == round(20 * 110 / rows * plan["steps"] * 8)
    assert plan["hours"] == pytest.approx(plan["tokens"] / 100 / 3600, abs=1e-4)
    assert plan["gpu_hours"] == pytest.approx(8 * plan["hours"], abs=1e-3)
    # bfloat16 weights, fp32 copy and two moments: 14 bytes per parameter.
    assert plan["checkpoint_gb"] == pytest.approx(98) and plan["checkpoints_gb"] == pytest.approx(3 * 98)
    fits = {(row["zero_stage"], row["offload"]): row["fits"] for row in plan["memory"]}
    assert (0, "none") not in fits, "stage 0 cannot train in bfloat16"
    assert not fits[1, "none"] and fits[3, "none"] and fits[3, "all"]
    assert [row["zero_stage"] for row in plan["memory"] if row["chosen"]] == [2]
    assert plan["documents"] == {
        "longest": 60,
        "positions": 50,
        "beyond_positions": 20,
        "window": 25,
        "beyond_window": 40,
    }
    learned = dataclasses.replace(POSITIONS, learned=True)
    with pytest.raises(UserError, match=r"learned positions\n.*60 tokens\n.*at most 50\n"):
        make_run_plan({"train": train}, tmp_path / "plan", shape, learned, **options)
    with pytest.raises(UserError, match="does not fill one optimizer step"):
        make_run_plan(
            {"train": train | {"global_batch": 10**6}}, tmp_path / "plan", shape, POSITIONS, **options
        )


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("GPT2", {"n_positions": 128}, (128, True, None)),
        ("OPT", {"max_position_embeddings": 128}, (128, True, None)),
        ("Llama", {"max_position_embeddings": 128}, (128, False, None)),
        ("Mistral", {"sliding_window": 64, "max_position_embeddings": 128}, (128, False, 64)),
        ("Qwen2", {"sliding_window": 64, "use_sliding_window": False}, (32768, False, None)),
    ],
)
def test_the_lengths_that_a_base_was_made_for(name, settings, expected):
    import torch
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(num_hidden_layers=1, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert dataclasses.astuple(read_positions(model)) == expected


def test_of_a_model_with_recurrent_layers_the_forecast_is_a_lower_bound(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
    }
    config = AutoConfig.for_model("mamba2", **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba2")
    shape = read_shape(empty_model(str(tmp_path / "mamba2")))
    assert "linear_attention" in shape.unknown and shape.parameters > 0
    folder = tmp_path / "train"
    write_bin(folder / "cn" / "d" / "a.bin", [[1] * 60] * 20)
    make_plan(folder, ["cn/d/a.bin"], 64).write(tmp_path / "plan")
    names = ("max_steps", "global_batch", "processes")
    train = dict.fromkeys(names) | {"accumulative_counts": 1, "max_epochs": 1, "dtype": "auto"}
    train |= {"sequence_parallel": 1, "gradient_checkpointing": True, "zero_stage": 2, "offload": "none"}
    train |= {"save_optimizer": True, "save_total_limit": 2}
    options = {"gpus": 0, "tokens_per_second": None}
    for memory, fits in ((80, None), (0.01, False)):
        plan = make_run_plan(
            {"train": train}, tmp_path / "plan", shape, POSITIONS, device_gib=memory, **options
        )
        assert "linear_attention" in plan["activations_unknown"]
        assert {row["fits"] for row in plan["memory"]} == {fits}, "only what does not fit is certain"


@pytest.mark.parametrize(
    ("kind", "settings", "query"),
    [("gemma4_text", {"global_head_dim": 512}, 8 * 512), ("gemma3", {}, 8 * 256), ("llama", {}, 32 * 128)],
)
def test_the_widest_layer_is_what_counts(kind, settings, query):
    config = AutoConfig.for_model(kind, **settings).get_text_config()
    found, *_, unknown = _widths(config)
    assert found == query and unknown is None


def test_lora_counts_the_experts_that_it_adapts(tmp_path):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    AutoConfig.for_model("mixtral", **sizes).save_pretrained(tmp_path)
    rank = 2
    attention = (32 + 32) * 2 + (32 + 16) * 2
    experts = 4 * (2 * (32 + 96) + (48 + 32)) + (32 + 4)  # gate and up in one at twice the rank, down, router
    assert count_parameters(empty_model(str(tmp_path)), rank)[1] == 2 * rank * (attention + experts)
