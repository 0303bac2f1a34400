"""What lmdeploy cannot serve is refused from config.json alone, and published models of the supported families pass."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from export_models import converter_python
from snaketune.common.cli import UserError
from snaketune.export.turbomind_limits import (
    PROVED_ARCHITECTURES,
    UNPROVED_ARCHITECTURES,
    base_config,
    check_limits,
    check_run,
)
from snaketune.serving.lmdeploy_engines import ignored_window, longest_session, session_length

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 4096}
QWEN = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "sliding_window": 8192,
    "use_sliding_window": True,
    "max_window_layers": 16,
}
MIXTURE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "head_dim": 128,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

# What the published config.json files say, and the longest session.
PUBLISHED = {
    "Mistral-7B-v0.1": (MISTRAL, 4096),
    "Mistral-7B-v0.3": (MISTRAL | {"sliding_window": None, "rope_theta": 1e6}, 32768),
    "Mistral-Nemo": (MISTRAL | {"sliding_window": None, "hidden_size": 5120, "head_dim": 128}, 32768),
    "Llama-3.1-8B": (
        LLAMA
        | {
            "max_position_embeddings": 131072,
            "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
        },
        131072,
    ),
    "Qwen2.5-7B": (
        QWEN | {"use_sliding_window": False, "hidden_size": 3584, "num_attention_heads": 28},
        32768,
    ),
    "Qwen2.5-7B with yarn": (QWEN | {"use_sliding_window": False, "rope_scaling": YARN}, 32768),
    "Qwen3-30B-A3B": (MIXTURE | {"hidden_size": 2048, "num_key_value_heads": 4}, 32768),
    "Mixtral-8x7B": (
        LLAMA
        | {
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        32768,
    ),
    "internlm2-7b": (
        LLAMA
        | {
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        32768,
    ),
}
REFUSED = [
    (LLAMA | {"architectures": ["GraniteForCausalLM"]}, {}, "GraniteForCausalLM", "turbomind.enabled: false"),
    (LLAMA | {"architectures": ["GemmaForCausalLM"]}, {}, "GemmaForCausalLM", "turbomind.mode: direct"),
    (LLAMA | {"architectures": ["DeepseekV2ForCausalLM"]}, {}, "no proof", "parity.enabled: false"),
    (LLAMA | {"num_attention_heads": 64, "head_dim": 96}, {}, "heads of size 96", "turbomind.enabled"),
    # lmdeploy's check looks at the quotient, and the message says so.
    (LLAMA | {"num_attention_heads": 128, "head_dim": 64}, {}, "4096 / 128 = 32, although", "mode: direct"),
    (PUBLISHED["internlm2-7b"][0] | {"hidden_size": 2048}, {}, "heads of size 64", "turbomind.enabled"),
    (PUBLISHED["internlm2-7b"][0] | {"bias": True}, {}, "leaves out the biases", "turbomind.enabled"),
    (LLAMA | {"attention_bias": True}, {}, "attention_bias: true", "turbomind.enabled"),
    (LLAMA | {"hidden_act": "gelu"}, {}, "gelu", "turbomind.enabled"),
    (LLAMA | {"rope_scaling": {"rope_type": "longrope"}}, {}, "longrope", "turbomind.enabled"),
    (LLAMA | {"rope_scaling": {"type": "linear"}}, {}, "linear rope without factor", "config.json"),
    (LLAMA | {"rope_scaling": YARN | {"truncate": False}}, {}, "truncate: false", "turbomind.enabled"),
    (LLAMA | {"partial_rotary_factor": 0.5}, {}, "partial_rotary_factor 0.5", "turbomind.enabled"),
    (LLAMA | {"rope_parameters": {"full_attention": {}}}, {}, "differs by layer", "turbomind.enabled"),
    (LLAMA, {"tp": 3}, "tp 3; 32 attention heads", "turbomind.tp: 1"),
    (LLAMA | {"num_key_value_heads": 6}, {"tp": 4}, "6 KV heads", "turbomind.tp"),
    (LLAMA, {"session_len": 32769}, "at most 32768: the model's max_position", "session_len: 32768"),
    (MISTRAL, {"session_len": 4097}, "at most 4096: the model's sliding window", "session_len: 4096"),
    (QWEN, {"session_len": 8193}, "sliding window", "session_len: 8192"),
    (MIXTURE | {"num_experts": 256}, {}, "256 experts", "turbomind.enabled"),
    (MIXTURE | {"num_experts_per_tok": 9}, {}, "9 per token", "turbomind.enabled"),
    (MIXTURE | {"num_experts_per_tok": None}, {}, "the number of experts", "config.json"),
    (MIXTURE | {"mlp_only_layers": [0]}, {}, "mlp_only_layers: [0]", "turbomind.enabled"),
    (MIXTURE | {"decoder_sparse_step": 2}, {}, "decoder_sparse_step: 2", "turbomind.enabled"),
    # lmdeploy 0.10 and later
    (LLAMA | {"architectures": ["GraniteForCausalLM"]}, {"mode": "direct"}, "Granite", "turbomind.enabled"),
    (LLAMA | {"rope_scaling": YARN}, {"mode": "direct"}, "another yarn factor", "turbomind.mode: convert"),
    (LLAMA | {"head_dim": 96}, {"mode": "direct"}, "heads of size 96", "turbomind.enabled"),
    (QWEN, {"mode": "direct", "session_len": 8193}, "sliding window", "session_len: 8192"),
    (MISTRAL, {"mode": "direct", "tp": 64}, "tp 64", "turbomind.tp"),
]


def settings(**own) -> dict:
    return {"mode": "convert", "tp": 1, "session_len": None, "enabled": True} | own


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_served(name):
    config, longest = PUBLISHED[name]
    assert longest_session(config) == longest
    check_limits(config, settings(tp=4, session_len=longest), "", proved=True)


@pytest.mark.parametrize(("config", "own", "found", "fix"), REFUSED)
def test_what_would_fail_or_be_wrong_is_refused_with_the_way_out(config, own, found, fix):
    with pytest.raises(UserError) as caught:
        check_limits(config, settings(**own), "config: run 'one': ", proved=True)
    message = str(caught.value)
    assert message.startswith("config: run 'one': ")
    assert found in message and fix in message.partition("to fix:")[2]


def test_mistral_keeps_its_window_on_the_newer_engine():
    check_limits(MISTRAL, settings(mode="direct", session_len=32768), "", proved=True)


def test_only_a_window_that_the_engine_ignores_limits_a_hugging_face_folder():
    assert (session_length(QWEN, None), session_length(QWEN, 100)) == (8192, 100)
    assert session_length(MISTRAL, None) is session_length(LLAMA, None) is None


def test_an_unproved_architecture_passes_without_the_gate():
    check_limits(LLAMA | {"architectures": ["DeepseekV2ForCausalLM"]}, settings(), "", proved=False)


def test_the_list_is_lmdeploys_own():
    """Reads the source: importing lmdeploy takes seconds."""
    package = Path(converter_python()).parent.parent / "lib"
    (source,) = package.glob("python*/site-packages/lmdeploy/turbomind/supported_models.py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    assigned = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    call = assigned["SUPPORTED_ARCHS"]
    assert sorted(each.arg for each in call.keywords) == sorted(PROVED_ARCHITECTURES + UNPROVED_ARCHITECTURES)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("mistral", {"sliding_window": 16}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {}),
        ("mixtral", {"sliding_window": 16}),
        ("mixtral", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
        ("qwen3", {}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}),
        ("qwen3_moe", {"sliding_window": 16}),
        ("llama", {"sliding_window": 16}),
    ],
)
def test_a_window_counts_where_transformers_uses_it(kind, own):
    """It is the first token whose logits full attention would change."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    def attend_to_all(module, query, key, value, mask, scaling, **kwargs):
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return mixed.transpose(1, 2), None

    AttentionInterface.register("attend_to_all", attend_to_all)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "vocab_size": 32, "num_experts": 2, "num_local_experts": 2}
    sizes |= {"num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes, **own, attn_implementation="eager")
    ).eval()
    ids = torch.randint(32, (1, 24))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
        windowed = model(input_ids=ids, use_cache=False).logits[0]
        model.set_attn_implementation("attend_to_all")
        full = model(input_ids=ids, use_cache=False).logits[0]
    differs = ((windowed - full).abs() > 1e-5 * full.abs().max()).any(-1).nonzero().flatten().tolist()
    published = sizes | own | {"architectures": [type(model).__name__]}
    window = ignored_window(published)
    assert (window if window and window < 24 else None) == (differs[0] if differs else None)


@pytest.fixture
def run() -> dict:
    """A run's settings as far as the check reads them, on a hub model."""
    return {
        "model": {"path": None, "hub": "mistralai/Mistral-7B-v0.1"},
        "turbomind": settings(),
        "parity": {"enabled": True},
        "opencompass": {"enabled": False},
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Returns a function that puts a config.json of that model into an otherwise empty hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def put(config: dict) -> None:
        repository = tmp_path / "models--mistralai--Mistral-7B-v0.1"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        (repository / "snapshots" / "abc").mkdir(parents=True)
        (repository / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))

    return put


def test_a_hub_model_is_checked_once_it_is_here(run, hub):
    assert base_config(run["model"]) is None
    check_run("one", run)
    hub(LLAMA | {"architectures": ["GraniteForCausalLM"]})
    with pytest.raises(UserError, match="run 'one': TurboMind"):
        check_run("one", run)
    run["turbomind"]["enabled"] = False
    check_run("one", run)


def test_the_proof_of_an_architecture_refuses_what_lmdeploy_cannot_serve(run, tmp_path, run_script):
    from transformers import GraniteConfig

    GraniteConfig(architectures=["GraniteForCausalLM"]).save_pretrained(tmp_path)
    run["model"] = {"path": str(tmp_path), "hub": None}
    command = ("prove_architecture.py", tmp_path, "--output", tmp_path / "proof.json", "--turbomind-runs")
    refused = run_script(*command, json.dumps({"one": run}), check=False)
    assert refused.returncode == 2 and "error: config: run 'one': TurboMind" in refused.stderr
    assert not (tmp_path / "proof.json").exists()
    run_script(*command, json.dumps({"one": run | {"turbomind": settings(enabled=False)}}))
    assert (tmp_path / "proof.json").is_file()


def test_opencompass_stays_within_the_window(run, hub):
    hub(MISTRAL)
    lengths = {"max_seq_len": 4096, "longtext_max_seq_len": 32768}
    run["opencompass"] = {"enabled": True, "backend": "turbomind", "groups": ["base"], **lengths}
    check_run("one", run)
    run["opencompass"]["groups"] = ["base", "longtext"]
    with pytest.raises(
        UserError, match=r"longtext_max_seq_len: 32768(.|\n)*set opencompass.longtext_max_seq_len: 4096"
    ):
        check_run("one", run)
    for own in (
        {"opencompass": run["opencompass"] | {"backend": "hf"}},
        {"turbomind": settings(mode="direct")},
    ):
        check_run("one", run | own)


def test_a_broken_config_is_told(run, hub, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        base_config({"path": str(tmp_path), "hub": None})
