"""The proof of a TurboMind workspace: lmdeploy's own output passes, and every defect is caught and named."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from environments import REPO
from export_models import converter_python, write_base
from snaketune.common.cli import UserError
from snaketune.common.files import read_json, write_json
from snaketune.export.hf_folder import save_model
from snaketune.parity.turbomind_proof import prove

pytestmark = pytest.mark.slow

WEIGHTS = Path("triton_models/weights")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# As in internlm2-chat-7b; lmdeploy's reader only supports heads of size 128.
INTERNLM2 = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 54321.0, "factor": 3.0}
# With `factor` other than max_position_embeddings / original, and numbers of which lmdeploy reads none.
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 54321.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.4,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 36}
# name: (kind of model, its settings, tp, dtype)
FAMILIES = {
    "mistral": ("mistral", {}, 1, "float16"),
    "mistral tp 2, padded": ("mistral", {"intermediate_size": 97, "vocab_size": 701}, 2, "bfloat16"),
    "llama tied": ("llama", {"tie_word_embeddings": True}, 1, "bfloat16"),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}, 1, "float16"),
    "llama tp 8, copied KV heads": (
        "llama",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512},
        8,
        "float16",
    ),
    "qwen2 tp 4": (
        "qwen2",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 256},
        4,
        "bfloat16",
    ),
    "qwen3": ("qwen3", {}, 1, "bfloat16"),
    "linear rope": ("mistral", {"rope_parameters": LINEAR_ROPE}, 1, "float16"),
    "yarn rope": ("qwen3", {"rope_parameters": YARN_ROPE}, 1, "float16"),
    "window": ("mistral", {"sliding_window": 16}, 1, "float16"),
    "mixtral": ("mixtral", {"num_local_experts": 5, "intermediate_size": 36}, 1, "float16"),
    "mixtral tp 8, padded": (
        "mixtral",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "hidden_size": 512,
            "num_local_experts": 3,
            "intermediate_size": 36,
        },
        8,
        "bfloat16",
    ),
    "qwen2 mixture tp 2": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 45}, 2, "float16"),
    "qwen3 mixture": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}, 1, "bfloat16"),
    "internlm2": ("internlm2", INTERNLM2, 1, "float16"),
    "internlm2 tp 2": ("internlm2", INTERNLM2, 2, "bfloat16"),
}
# All numbers of GPUs for the most common families, with alternating types; 4 KV heads on 8 GPUs are copied.
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 512, "intermediate_size": 64}
MATRIX = {
    f"{family} tp {tp} {dtype}": (kind, HEADS | settings, tp, dtype)
    for family, kind, settings, dtypes in (
        ("mistral", "mistral", {}, ("float16", "bfloat16")),
        ("llama untied", "llama", {}, ("bfloat16", "float16")),
        ("llama tied", "llama", {"tie_word_embeddings": True}, ("float16", "bfloat16")),
        ("qwen2", "qwen2", {}, ("bfloat16", "float16")),
    )
    for tp, dtype in zip((1, 2, 4, 8), dtypes * 2, strict=True)
}
FAMILIES |= MATRIX
_DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from snaketune.export.turbomind_convert import convert
for job in json.loads(sys.argv[2]):
    convert("internlm2-chat-7b", Path(job["hf"]), Path(job["dst"]), tp=job["tp"], dtype=job["dtype"])
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tiny_tokenizer_dir) -> dict[str, tuple[Path, Path]]:
    """(Hugging Face folder, TurboMind workspace) of each family, all converted by lmdeploy in one process."""
    from transformers import AutoModelForCausalLM

    python = converter_python()
    root, jobs, folders, models = tmp_path_factory.mktemp("proof"), [], {}, {}

    def write_model(kind: str, settings: dict) -> Path:
        hf = root / f"hf{len(models)}"
        write_base(hf, tiny_tokenizer_dir, "llama" if kind == "internlm2" else kind, **settings)
        model = AutoModelForCausalLM.from_pretrained(hf)
        with torch.no_grad():  # biases and norms start as 0 and 1, which would hide errors
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        save_model(model, hf, "float32")
        if kind == "mixtral":  # as published
            config = read_json(hf / "config.json")
            write_json(hf / "config.json", {key: config[key] for key in config if key != "head_dim"})
        if kind == "internlm2":
            shutil.copytree(hf, hf.with_name("llama"))
            make_internlm2(hf)
        return hf

    for number, (name, (kind, settings, tp, dtype)) in enumerate(FAMILIES.items()):
        key = kind, json.dumps(settings)
        if key not in models:
            models[key] = write_model(kind, settings)
        hf, dst = models[key], root / f"tm{number}"
        jobs.append({"hf": str(hf), "dst": str(dst), "tp": tp, "dtype": dtype})
        folders[name] = hf, dst
    command = [python, "-c", _DRIVER, str(REPO / "workflow_scripts"), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


def make_internlm2(folder: Path) -> None:
    """Turns a Llama's folder into InternLM2's: renames tensors, and stacks q, k and v of each KV head."""
    from safetensors.torch import load_file, save_file

    llama, result = load_file(folder / "model.safetensors"), {}
    size, group = 128, 2
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attention_norm",
    }
    for name, tensor in llama.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "_proj" not in name:
            result[name] = tensor
    for layer in range(2):
        q, k, v = (llama[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] for letter in "qkv")
        blocks = []
        for head in range(2):
            blocks += [q[head * group * size : (head + 1) * group * size]]
            blocks += [each[head * size : (head + 1) * size] for each in (k, v)]
        result[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(blocks)
    save_file(result, folder / "model.safetensors", {"format": "pt"})
    config = read_json(folder / "config.json")
    for name in ("rope_parameters", "head_dim", "attention_bias", "mlp_bias", "dtype"):
        config.pop(name, None)
    config |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
    write_json(folder / "config.json", config | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})


@pytest.fixture
def copy(converted, tmp_path):
    """Returns a function that copies a family's workspace, for a test to break."""

    def make(name: str) -> tuple[Path, Path]:
        hf, turbomind = converted[name]
        return hf, shutil.copytree(turbomind, tmp_path / "tm", symlinks=True)

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_what_lmdeploy_writes_is_proved(converted, name):
    proof = prove(*converted[name])
    _, _, tp, dtype = FAMILIES[name]
    assert (proof["tp"], proof["dtype"]) == (tp, dtype)
    assert proof["tensors"] == len(read_tensor_names(converted[name][0]))
    assert proof["forward"]["relative_difference"] < 1e-5
    assert proof["forward"]["top1_agreement"] == 1.0


def test_internlm2_computes_what_the_llama_of_its_parts_computes(converted):
    from transformers import AutoModelForCausalLM

    from snaketune.export.turbomind_folder import TurboMindFolder
    from snaketune.parity.reference_forward import turbomind_logits

    hf, turbomind = converted["internlm2"]
    ids = torch.arange(40)[None] * 7
    llama = AutoModelForCausalLM.from_pretrained(hf.with_name("llama")).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.copy_(parameter.half())
        expected = llama(input_ids=ids, use_cache=False).logits
    found = turbomind_logits(TurboMindFolder(turbomind), ids)
    assert (found - expected).norm() / expected.norm() < 1e-5


def read_tensor_names(hf: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(hf / "model.safetensors", "pt") as file:
        names = set(file.keys())
    if "output.weight" in names:  # InternLM2: three tensors of one `wqkv`, in two layers
        return names | {"1", "2", "3", "4"}
    # A tied head is stored once and written twice.
    return names if "lm_head.weight" in names else names | {"lm_head.weight"}


def edit_config(turbomind: Path, change) -> None:
    path = turbomind / WEIGHTS / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


def refusal(hf: Path, turbomind: Path) -> str:
    with pytest.raises(UserError) as caught:
        prove(hf, turbomind)
    return str(caught.value)


def test_one_flipped_bit_is_named(copy):
    hf, turbomind = copy("mistral tp 2, padded")
    path = turbomind / WEIGHTS / "layers.1.feed_forward.w2.1.weight"
    data = np.fromfile(path, dtype=np.uint16)
    data[5] ^= 1
    data.tofile(path)
    message = refusal(hf, turbomind)
    assert "model.layers.1.mlp.down_proj.weight: 1 of" in message


def test_swapped_heads_are_named(copy):
    hf, turbomind = copy("mistral")
    path = turbomind / WEIGHTS / "layers.0.attention.w_qkv.0.weight"
    data = np.fromfile(path, dtype=np.uint16).reshape(128, 4, 64)
    data[:, [0, 1]] = data[:, [1, 0]]
    data.tofile(path)
    message = refusal(hf, turbomind)
    assert "model.layers.0.self_attn.q_proj.weight" in message
    assert "k_proj" not in message


@pytest.mark.parametrize(
    "field, change",
    [
        ("rope_theta", lambda c: c["attention_config"]["rope_param"].update(base=10000.0)),
        ("norm_eps", lambda c: c["model_config"].update(norm_eps=1e-5)),
        ("session_len", lambda c: c["model_config"].update(session_len=4096)),
        ("rope_type", lambda c: c["attention_config"]["rope_param"].update(type="linear", factor=2.0)),
    ],
)
def test_another_setting_is_named(copy, field, change):
    hf, turbomind = copy("mistral")
    edit_config(turbomind, change)
    assert f"{field}: " in refusal(hf, turbomind)


@pytest.mark.parametrize(
    "name, field, change",
    [
        ("window", "session_len: 16", lambda c: c["model_config"].update(session_len=512)),
        ("linear rope", "rope_factor", lambda c: c["attention_config"]["rope_param"].update(factor=2.0)),
        *(
            ("yarn rope", f"rope_{name}", lambda c, name=name: c["attention_config"]["rope_param"].update({name: 3.0}))
            for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "max_position_embeddings")
        ),
        ("internlm2", "rope_max_position_embeddings", lambda c: c["attention_config"]["rope_param"].update(max_position_embeddings=7)),
        ("qwen3 mixture", "normalised_experts", lambda c: c["model_config"].update(norm_topk_prob=False)),
        ("qwen3 mixture", "experts_per_token", lambda c: c["model_config"].update(experts_per_token=1)),
        ("qwen2 mixture tp 2", "shared_expert_gate", lambda c: c["model_config"].update(moe_shared_gate=False)),
        ("mixtral", "routed_scale", lambda c: c["model_config"].update(routed_scale=2.0)),
    ],
)  # fmt: skip
def test_another_number_of_rope_window_or_experts_is_named(copy, name, field, change):
    hf, turbomind = copy(name)
    edit_config(turbomind, change)
    assert field in refusal(hf, turbomind)


@pytest.mark.parametrize(
    "name, change",
    [
        ("yarn rope", lambda c: c["attention_config"]["rope_param"].update(attention_factor=1.0)),
        ("yarn rope", lambda c: c["attention_config"]["rope_param"].update(beta_slow=1.0)),
        ("mixtral", lambda c: c["model_config"].update(norm_topk_prob=False)),
        ("qwen3 mixture", lambda c: c["model_config"].update(experts_per_token=3)),
    ],
)
def test_the_logits_alone_show_a_wrong_setting(copy, monkeypatch, name, change):
    """Without the comparison of settings."""
    from snaketune.parity import turbomind_proof

    hf, turbomind = copy(name)
    edit_config(turbomind, change)
    monkeypatch.setattr(turbomind_proof, "compare_config", lambda *_: {})
    message = refusal(hf, turbomind)
    assert "different logits" in message or "chooses other experts" in message


def test_swapped_experts_are_named(copy):
    hf, turbomind = copy("qwen3 mixture")
    one, other = (turbomind / WEIGHTS / f"layers.1.moe_ffn.experts.{each}.w2.0.weight" for each in (2, 4))
    bytes_of_one = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(bytes_of_one)
    message = refusal(hf, turbomind)
    assert "model.layers.1.mlp.experts.2.down_proj.weight" in message
    assert "model.layers.1.mlp.experts.4.down_proj.weight" in message and "gate_proj" not in message


def test_a_router_that_clearly_chooses_others_is_told(converted):
    from snaketune.export.turbomind_folder import TurboMindFolder
    from snaketune.parity.reference_forward import turbomind_logits

    folder = TurboMindFolder(converted["mixtral"][1])
    ids = torch.arange(20)[None] * 7
    routes = [torch.tensor([0, 1]).expand(1, 20, 2)] * folder.layers
    with pytest.raises(UserError, match="router of layer 0 chooses other experts"):
        turbomind_logits(folder, ids, routes)


def test_between_equal_experts_the_other_models_choice_is_followed(copy):
    """There rounding decides, so the choice says nothing about the weights."""
    from snaketune.export.turbomind_folder import TurboMindFolder
    from snaketune.parity.reference_forward import turbomind_logits

    _, turbomind = copy("mixtral")
    for path in (turbomind / WEIGHTS).glob("*.moe_ffn.gate.weight"):
        path.write_bytes(bytes(path.stat().st_size))
    folder = TurboMindFolder(turbomind)
    ids = torch.arange(20)[None] * 7
    one, other = (
        turbomind_logits(folder, ids, [torch.tensor(pair).expand(1, 20, 2)] * folder.layers)
        for pair in ([0, 1], [2, 3])
    )
    assert not torch.allclose(one, other, rtol=0.1)


def test_another_router_is_named(copy):
    hf, turbomind = copy("mixtral")
    path = turbomind / WEIGHTS / "layers.0.moe_ffn.gate.weight"
    data = np.fromfile(path, dtype=np.uint16).reshape(128, 5)
    data[:, [0, 1]] = data[:, [1, 0]]
    data.tofile(path)
    assert "model.layers.0.block_sparse_moe.gate.weight" in refusal(hf, turbomind)


def test_the_logits_alone_show_a_wrong_theta(copy, monkeypatch):
    """Without the comparison of settings."""
    from snaketune.parity import turbomind_proof

    hf, turbomind = copy("mistral")
    edit_config(turbomind, lambda c: c["attention_config"]["rope_param"].update(base=10000.0))
    monkeypatch.setattr(turbomind_proof, "compare_config", lambda *_: {})
    assert "different logits" in refusal(hf, turbomind)


def test_missing_short_and_surplus_files_are_named(copy):
    hf, turbomind = copy("mistral")
    weights = turbomind / WEIGHTS
    (weights / "layers.2.attention_norm.weight").write_bytes(b"\0\0")
    assert "layers.2.attention_norm.weight: file does not belong to any weight" in refusal(hf, turbomind)
    (weights / "layers.2.attention_norm.weight").unlink()
    path = weights / "norm.weight"
    path.write_bytes(path.read_bytes()[:-2])
    assert "norm.weight" in refusal(hf, turbomind)
    path.unlink()
    assert "no such file" in refusal(hf, turbomind)


def test_padding_and_copies_must_be_clean(copy):
    hf, turbomind = copy("llama tp 8, copied KV heads")
    path = turbomind / WEIGHTS / "layers.0.attention.w_qkv.1.weight"
    data = np.fromfile(path, dtype=np.uint16).reshape(512, 3, 64)
    data[7, 1, 3] ^= 1
    data.tofile(path)
    assert "copies of a KV head differ" in refusal(hf, turbomind)


def test_an_unknown_architecture_is_refused(copy, tmp_path):
    hf, turbomind = copy("mistral")
    other = shutil.copytree(hf, tmp_path / "other")
    write_json(other / "config.json", {**read_json(hf / "config.json"), "architectures": ["FooForCausalLM"]})
    assert "FooForCausalLM" in refusal(other, turbomind)


def test_the_script_writes_the_proof(converted, tmp_path, run_script):
    hf, turbomind = converted["mistral"]
    done = run_script("prove_turbomind.py", hf, turbomind, "--output", tmp_path / "proof.json")
    assert "tensors equal bit for bit" in done.stdout
    assert read_json(tmp_path / "proof.json")["config"]["rope_theta"] == 54321.0
