"""FLOPs of a training step, compared with a count of every matrix product in a small model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
)

from snaketune.models.attention_shapes import UnknownShape, attention_shapes
from snaketune.models.flops import ModelFlops, model_flops, peak_tflops

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def counted(model, tokens: int) -> int:
    """FLOPs of forward and backward over one document from torch's count of matrix products, with full attention."""
    ids = torch.arange(tokens)[None] % 128
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tokens", [32, 128])
def test_formula_counts_every_matrix_product(tokens):
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="eager")
    flops = model_flops(model)
    # The counter counts both halves of the square. The first layer's input has a gradient: the embedding's.
    attention = flops.per_pair[None, None] * tokens * tokens / 2
    assert flops.step([tokens], tokens) + attention == pytest.approx(counted(model, tokens), rel=0.005)


def test_documents_count_alone_and_the_head_where_tokens_are_trained():
    flops = model_flops(LlamaForCausalLM(LlamaConfig(**SIZES)))
    whole, halves = flops.step([128], 0), flops.step([64, 64], 0)
    assert whole - halves == pytest.approx(6 * 3 * 4 * 16 * (128**2 - 2 * 64**2))
    assert flops.step([128], 10) - whole == 10 * 6 * 64 * 128


def test_tied_windowed_frozen_and_expert_models():
    untied, tied = (
        model_flops(LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)))
        for tied in (False, True)
    )
    assert untied == tied
    windowed = model_flops(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)))
    narrow = windowed.step([16, 16], 0), windowed.step([32], 0)
    pairs = sum(min(i + 0.5, 16) for i in range(32))
    assert narrow[1] - windowed.per_token * 32 == pytest.approx(windowed.per_pair[16, None] * pairs, rel=0.05)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.requires_grad_(False)
    assert model_flops(model).per_token == pytest.approx(untied.per_token * 4 / 6)

    from transformers import MixtralForCausalLM

    config = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    others = sum(p.numel() for name, p in model.model.layers.named_parameters()) - experts + 64
    assert model_flops(model).per_token == pytest.approx(6 * (others + experts / 4))


def test_layers_with_heads_and_windows_of_their_own():
    """Gemma 4: wider heads in the layers without a window. Counted with a document within the window."""
    sizes = SIZES | {
        "num_hidden_layers": 6,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 0,
    }
    config = AutoConfig.for_model("gemma4_text", **sizes, global_head_dim=32, sliding_window=64)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    flops = model_flops(model)
    wide = sum(kind == "full_attention" for kind in config.layer_types)
    assert 0 < wide < 6
    assert flops.per_pair == {(64, None): 12 * 4 * 16 * (6 - wide), (None, None): 12 * 4 * 32 * wide}
    both_halves = sum(flops.per_pair.values()) * 48 * 48 / 2
    assert flops.step([48], 48) + both_halves == pytest.approx(counted(model, 48), rel=0.01)


def test_chunks_are_documents_of_their_own_and_latent_heads_have_two_widths():
    llama4 = AutoConfig.for_model("llama4_text", **SIZES | {"num_hidden_layers": 4}, attention_chunk_size=16)
    assert [shape.chunk for shape in attention_shapes(llama4)] == [16, 16, 16, None]
    chunked = ModelFlops(0.0, 0.0, {(None, 16): 1.0})
    assert chunked.step([40], 0) == chunked.step([16, 16, 8], 0) == (16**2 + 16**2 + 8**2) / 2
    latent = AutoConfig.for_model(
        "deepseek_v3", **SIZES | {"head_dim": None}, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
    )
    assert {(each.query, each.value) for each in attention_shapes(latent)} == {(4 * 12, 4 * 6)}


@pytest.mark.parametrize("kind", ["mamba2", "falcon_mamba", "jamba", "qwen3_next", "lfm2"])
def test_a_model_with_recurrent_layers_has_no_figure_and_says_why(kind):
    settings = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}
    with pytest.raises(UnknownShape, match="layers of type"):
        attention_shapes(AutoConfig.for_model(kind, **settings))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA L40S", 362.0),
        ("Some other device", None),
    ],
)
def test_peak_of_a_device_by_its_name(name, peak):
    assert peak_tflops(name, torch.bfloat16) == peak
    assert peak_tflops(name, torch.float32) is None
