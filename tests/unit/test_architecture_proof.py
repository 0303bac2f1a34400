"""The proof of an architecture: kinds of layers that train correctly, and those that are refused by their own words.

The reference is transformers' plain attention on each document alone, which the proof itself compares with.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BambaConfig,
    BertConfig,
    BlenderbotSmallConfig,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    Phi3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    ZayaConfig,
)

from snaketune.common.cli import UserError
from snaketune.models import packed_attention
from snaketune.models.base_model import fit_attention, read_model_config
from snaketune.models.isolation import leak, random_row
from snaketune.models.twin import VOCABULARY, build, make_twin
from snaketune.preflight.architecture_proof import TrainingOptions, _works, prove
from snaketune.training.isolation_check import require_isolated_documents

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + n / 48 for n in range(48)],
    "long_factor": [2.0 + n for n in range(48)],
    "original_max_position_embeddings": 4096,
}
PHI3 = {"hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131072}
LFM2 = Lfm2Config(full_attn_idxs=[2], num_hidden_layers=3)
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def options(**changed) -> TrainingOptions:
    settings = {
        "attention": "auto",
        "packing": "best_fit",
        "max_length": 32768,
        "gradient_checkpointing": True,
    }
    return TrainingOptions(**{**settings, **changed}, trust_remote_code=False)


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        pytest.param(LlamaConfig(num_key_value_heads=8), "packed", id="full"),
        pytest.param(MistralConfig(sliding_window=4096), "packed", id="sliding"),
        pytest.param(Gemma3TextConfig(), "packed", id="sliding and full"),
        pytest.param(Llama4TextConfig(), "packed", id="chunked"),
        pytest.param(DeepseekV3Config(), "packed", id="MLA"),
        pytest.param(GptOssConfig(), "packed", id="sinks"),
        pytest.param(Gemma2Config(), "packed", id="capped scores"),
        pytest.param(Qwen3MoeConfig(), "packed", id="MoE"),
        pytest.param(GPT2Config(), "packed", id="learned positions"),
        pytest.param(BloomConfig(), "eager", id="ALiBi"),
        pytest.param(MambaConfig(), "eager", id="mamba"),
        pytest.param(Mamba2Config(), "eager", id="mamba 2"),
        pytest.param(RwkvConfig(hidden_size=256, num_hidden_layers=2), "eager", id="RWKV"),
        pytest.param(JambaConfig(), "packed", id="mamba, attention and MoE"),
        pytest.param(BambaConfig(), "packed", id="mamba 2 and attention"),
        pytest.param(LFM2, "packed", id="short convolution"),
        pytest.param(Qwen3NextConfig(), "packed", id="linear attention"),
        pytest.param(MiniMaxConfig(), "packed", id="lightning attention"),
        pytest.param(RecurrentGemmaConfig(), "packed", id="RG-LRU"),
        pytest.param(ZayaConfig(), "packed", id="convolution in attention"),
    ],
)
def test_a_kind_of_layer_that_trains_correctly(config, attention):
    proof = prove(config, options())
    assert proof["attention"] == attention
    assert all(check["difference"] <= check["bound"] for check in proof["checks"])
    assert proof["twin"]["weights"] < 30_000_000


REFUSED = [
    pytest.param(
        DogeConfig(),
        {},
        "DogeAttention in layers 0, 1:",
        "packing.mode: single and train.attention: eager",
        id="a mask of the layer's own",
    ),
    pytest.param(
        BlenderbotSmallConfig(), {}, "logits differ", "packing.mode: single", id="positions of the row"
    ),
    pytest.param(
        Phi3Config(rope_parameters=LONGROPE, **PHI3),
        {},
        "longrope takes its frequencies from the longest document",
        "max_length to at most 4096, or packing.mode: single",
        id="longrope",
    ),
    pytest.param(
        LlamaConfig(rope_parameters=DYNAMIC, max_position_embeddings=4096),
        {},
        "dynamic takes its frequencies",
        "set train.max_length to at most 4096$",
        id="dynamic rope",
    ),
    pytest.param(
        LlamaConfig(rope_parameters=DYNAMIC, max_position_embeddings=4096),
        {"packing": "single"},
        "dynamic takes its frequencies",
        "set train.max_length to at most 4096$",
        id="dynamic rope remembers earlier documents",
    ),
    pytest.param(
        Gemma3TextConfig(use_bidirectional_attention=True),
        {},
        "tokens see later tokens",
        "choose another base model",
        id="bidirectional",
    ),
    pytest.param(BertConfig(), {}, "tokens see later tokens", "choose another base model", id="encoder"),
    pytest.param(
        BloomConfig(),
        {"attention": "sdpa"},
        "attention packed does not compute bloom correctly",
        "train.attention: auto",
        id="attention",
    ),
]


@pytest.mark.parametrize(("config", "changed", "found", "fix"), REFUSED)
def test_a_kind_of_layer_that_would_train_wrongly_is_refused(config, changed, found, fix):
    with pytest.raises(UserError, match=rf"(?s){found}.*to fix: .*{fix}"):
        prove(config, options(**changed))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(Mamba2Config(), id="mamba"),
        pytest.param(BlenderbotSmallConfig(), id="positions of the row"),
        pytest.param(Phi3Config(rope_parameters=LONGROPE, **PHI3), id="longrope"),
    ],
)
def test_a_document_alone_is_right_for_every_architecture(config):
    prove(config, options(packing="single"))


def test_advice_is_tried_by_the_measure_of_the_check():
    """Logits of 1e5 differ by more than 1e-3 through rounding alone."""
    config = CohereConfig(logit_scale=1e5)
    assert prove(config, options())["checks"][1]["difference"] < 1e-4
    assert _works(config, options())


def test_a_rope_within_its_trained_length_is_not_refused():
    prove(Phi3Config(rope_parameters=LONGROPE, **PHI3), options(max_length=4096))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sinks_in_both_attentions(attention):
    """transformers makes gpt-oss's masks without position ids: only the noted boundaries keep documents apart."""
    prove(GptOssConfig(), options(attention=attention))


def test_lora_is_merged_on_dense_layers_and_experts():
    for config, dropout in ((LlamaConfig(), 0.1), (Qwen3MoeConfig(), 0.0)):
        proof = prove(config, options(lora={"rank": 4, "alpha": 8, "dropout": dropout}))
        assert proof["checks"][-1]["name"] == "LoRA merged = LoRA beside the weights"
        assert "adapted: " in proof["lora"] and "self_attn.q_proj (2)" in proof["lora"]


def test_adapters_that_the_model_passes_by_are_refused():
    """Jamba reads the weight of a projection without calling the layer, so its adapter has no effect until it is merged."""
    with pytest.raises(UserError, match=r"LoRA does not fit jamba\n.*merging them by [\d.]+ of"):
        prove(JambaConfig(), options(packing="single", lora={"rank": 4, "alpha": 8, "dropout": 0.0}))


def test_a_twin_has_every_kind_of_layer_and_crosses_every_limit():
    twin = make_twin(Llama4TextConfig(), longest=32768, trust_remote_code=False)
    assert twin.config.layer_types == ["chunked_attention"] * 3 + ["full_attention"]
    assert twin.config.attention_chunk_size == 16
    layers = make_twin(DeepseekV3Config(), longest=32768, trust_remote_code=False).model.layers
    assert [type(layer.mlp).__name__ for layer in layers] == ["DeepseekV3MLP"] * 3 + ["DeepseekV3MoE"]
    assert make_twin(MistralConfig(), longest=32768, trust_remote_code=False).config.sliding_window == 16


def trained(config):
    twin = make_twin(config, longest=32768, trust_remote_code=False)
    model = fit_attention("auto", "cpu", lambda name: build(twin.config, name, trust_remote_code=False))
    model.load_state_dict(twin.state_dict())
    return model.train()


def test_the_model_itself_is_checked_before_its_first_step():
    model = trained(LlamaConfig())
    state = torch.get_rng_state()
    require_isolated_documents(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    leaking = make_twin(LFM2, longest=32768, trust_remote_code=False)  # as transformers makes it
    leaking.set_attn_implementation("packed")
    with pytest.raises(UserError, match="documents of a packed sequence see each other in lfm2"):
        require_isolated_documents(leaking)
    # 16 bits have a wider bound: what is right passes it, and a leak is far above.
    for each in (model, trained(LFM2)):
        require_isolated_documents(each.bfloat16())
    assert leak(leaking.bfloat16(), random_row(VOCABULARY)) > 0.5


def test_an_argument_that_attention_does_not_know_is_an_error():
    """It may be a part of the scores."""
    parts = [torch.zeros(1, 2, 4, 8)] * 3
    with pytest.raises(TypeError, match="argument position_bias"):
        packed_attention.packed_attention(torch.nn.Module(), *parts, None, position_bias=torch.zeros(1))
    packed_attention.packed_attention(torch.nn.Module(), *parts, None, position_bias=None)


@pytest.mark.parametrize(
    "config", [Gemma2Config(), GptOssConfig(), Llama4TextConfig(), MistralConfig(), LFM2, JambaConfig()]
)
@pytest.mark.parametrize("padding", [0, 5])
@torch.no_grad()
def test_a_batch_and_a_cache_give_what_plain_attention_gives(config, padding):
    """Evaluation runs padded batches, and answers one token at a time."""
    twin = make_twin(config, longest=32768, trust_remote_code=False)
    model = fit_attention(
        "auto", "cpu", lambda name: build(twin.config, name, trust_remote_code=False)
    ).eval()
    model.load_state_dict(twin.state_dict())
    ids = random_row(VOCABULARY, (80,)).ids.view(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    both = [each(ids, **given, use_cache=False).logits[mask.bool()] for each in (model, twin)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
    row = ids[:1]
    cached = model(row[:, :-1], use_cache=True)
    last = model(row[:, -1:], past_key_values=cached.past_key_values, use_cache=True).logits[0, -1]
    torch.testing.assert_close(last, twin(row, use_cache=False).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_a_base_with_code_of_its_own(tmp_path):
    """Its code is in the base's folder, and not beside what the proof saves."""
    from module_experts import ModuleExpertsConfig, ModuleExpertsForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 300}
    config = ModuleExpertsConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    ModuleExpertsForCausalLM(config).save_pretrained(tmp_path)
    own = TrainingOptions("auto", "best_fit", 32768, True, trust_remote_code=True)
    assert prove(read_model_config(str(tmp_path), True), own)["attention"] == "packed"
