"""TurboMind workspaces, read back as raw files: every weight must be where the engine expects it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

from environments import REPO
from export_models import converter_python, extend_tokenizer, write_base, write_checkpoint
from snaketune.common.files import read_json, sha256_file, write_json

pytestmark = pytest.mark.slow

HEADS, KV_HEADS, SIZE, HIDDEN = 2, 1, 64, 128

# One process for everything that does not test the command line: importing the converter takes seconds.
_DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from snaketune.common.cli import UserError
from snaketune.export.turbomind_convert import convert
for job in json.loads(sys.argv[2]):
    try:
        convert("internlm2-chat-7b", Path(job["hf"]), Path(job["dst"]), **job.get("options", {}))
        print("RESULT", json.dumps("done"))
    except UserError as error:
        print("RESULT", json.dumps(str(error)))
"""


def run_driver(jobs: list[dict]) -> list[str]:
    """Converts all jobs in one process; returns "done" or the error's text for each."""
    command = [converter_python(), "-c", _DRIVER, str(REPO / "workflow_scripts"), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


@pytest.fixture(scope="module")
def hf(tmp_path_factory, tiny_tokenizer_dir):
    """(Hugging Face folder of a grown Mistral, its weights, its tokenizer)."""
    from safetensors.torch import load_file

    from snaketune.export.hf_convert import convert

    converter_python()
    root = tmp_path_factory.mktemp("turbomind")
    tokenizer = extend_tokenizer(tiny_tokenizer_dir, root / "tokenizer")
    base = write_base(root / "base", tiny_tokenizer_dir)
    config, checkpoint, _ = write_checkpoint(base, root / "tokenizer", root / "run")
    convert(config, checkpoint, root / "hf")
    return root / "hf", load_file(root / "hf" / "model.safetensors"), tokenizer


@pytest.fixture(scope="module")
def workspace(hf):
    """The workspace from the guide's command: tp 1, float16."""
    folder, weights, tokenizer = hf
    dst = folder.parent / "tm"
    command = [converter_python(), str(REPO / "workflow_scripts" / "convert_hf_to_turbomind.py")]
    command += ["internlm2-chat-7b", str(folder), "--dst-path", str(dst)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return dst, weights, tokenizer


def _raw(folder, name: str, dtype, columns: int) -> np.ndarray:
    return np.fromfile(folder / "triton_models" / "weights" / name, dtype=dtype).reshape(-1, columns)


def _half(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float16).numpy()


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()


def _rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Columns in the order of TurboMind's rotary kernel: dimension i next to i + 32, which HF keeps 32 apart."""
    result = np.empty_like(weight)
    for head in range(heads):
        for i in range(SIZE // 2):
            for half in (0, 1):
                result[:, head * SIZE + 2 * i + half] = weight[:, head * SIZE + half * SIZE // 2 + i]
    return result


def test_embedding_and_head_hold_every_row_and_the_new_ones(workspace):
    dst, weights, tokenizer = workspace
    embedding = _raw(dst, "tok_embeddings.0.weight", np.float16, HIDDEN)
    assert np.array_equal(embedding, _half(weights["model.embed_tokens.weight"]))
    output = _raw(dst, "output.0.weight", np.float16, embedding.shape[0])
    assert np.array_equal(output, _half(weights["lm_head.weight"]).T)
    assert len(tokenizer.added) == 6
    for token_id in tokenizer.added.values():
        assert np.array_equal(embedding[token_id], _half(weights["model.embed_tokens.weight"][token_id]))
        assert np.abs(embedding[token_id].astype(np.float32)).max() > 0


def test_layers_hold_the_right_numbers(workspace):
    dst, weights, _ = workspace
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        q, k, v, o = (_half(weights[f"{prefix}.self_attn.{name}_proj.weight"]).T for name in "qkvo")
        qkv = np.concatenate([_rotary_pairs(q, HEADS), _rotary_pairs(k, KV_HEADS), v], axis=1)
        assert np.array_equal(
            _raw(dst, f"layers.{layer}.attention.w_qkv.0.weight", np.float16, 4 * SIZE), qkv
        )
        assert np.array_equal(_raw(dst, f"layers.{layer}.attention.wo.0.weight", np.float16, HIDDEN), o)
        for theirs, ours in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            weight = _half(weights[f"{prefix}.mlp.{ours}_proj.weight"]).T
            raw = _raw(dst, f"layers.{layer}.feed_forward.{theirs}.0.weight", np.float16, weight.shape[1])
            assert np.array_equal(raw, weight)
        for theirs, ours in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            raw = _raw(dst, f"layers.{layer}.{theirs}.weight", np.float16, HIDDEN)[0]
            assert np.array_equal(raw, _half(weights[f"{prefix}.{ours}.weight"]))


def test_the_manifest_and_config_say_what_was_written(workspace, hf):
    import yaml

    dst, weights, _ = workspace
    manifest = read_json(dst / "manifest.json")
    config = yaml.safe_load((dst / "triton_models" / "weights" / "config.yaml").read_text())
    assert config["attention_config"]["rope_param"]["base"] == manifest["rope_theta"] == 54321.0
    assert config["model_config"]["model_arch"] == manifest["architecture"] == "MistralForCausalLM"
    assert config["model_config"]["chat_template"] == manifest["chat_template"] == "internlm2"
    assert manifest["model_name"] == "internlm2-chat-7b" and manifest["dtype"] == "float16"
    assert manifest["vocab_size"] == weights["model.embed_tokens.weight"].shape[0]
    assert manifest["versions"]["lmdeploy"] == "0.9.2.post1"
    assert manifest["hf_weights_sha256"] == read_json(hf[0] / "manifest.json")["weights_sha256"]
    paths = {str(path.relative_to(dst)) for path in dst.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == paths
    assert all(entry["sha256"] == sha256_file(dst / name) for name, entry in manifest["files"].items())
    assert (dst / "tokenizer.json").read_bytes() == (hf[0] / "tokenizer.json").read_bytes()


@pytest.fixture
def variant(hf, tmp_path):
    """Returns a function that copies the Hugging Face folder with other settings; None drops one."""

    def make(name: str, **changes) -> str:
        copy = shutil.copytree(hf[0], tmp_path / name)
        config = {**read_json(copy / "config.json"), **changes}
        write_json(copy / "config.json", {key: value for key, value in config.items() if value is not None})
        return str(copy)

    return make


def test_settings_that_lmdeploy_does_not_read_are_written_for_it(hf, variant, tmp_path):
    """The engine computes with config.yaml: rope in the spelling of transformers 5, a head size left out, a window."""
    import yaml

    folder, _, _ = hf
    rope = {
        "rope_type": "yarn",
        "rope_theta": 54321.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    rope |= {"mscale": 2.0, "mscale_all_dim": 0.5}
    variants = {
        "new": variant("new", rope_theta=None, rope_scaling=None),
        "no head size": variant("no_head_size", head_dim=None),
        "window": variant("window", sliding_window=64),
        "shorter": str(folder),
        "yarn": variant("yarn", rope_theta=None, rope_scaling=None, rope_parameters=rope),
    }
    options = {"shorter": {"session_len": 100}}
    jobs = [
        {"hf": hf_folder, "dst": str(tmp_path / f"{name}.tm"), "options": options.get(name, {})}
        for name, hf_folder in variants.items()
    ]
    assert run_driver(jobs) == ["done"] * len(jobs)
    models, ropes, manifests = {}, {}, {}
    for name in variants:
        config = yaml.safe_load((tmp_path / f"{name}.tm/triton_models/weights/config.yaml").read_text())
        models[name], ropes[name] = config["model_config"], config["attention_config"]["rope_param"]
        manifests[name] = read_json(tmp_path / f"{name}.tm" / "manifest.json")
    assert ropes["new"]["base"] == 54321.0
    assert models["no head size"]["size_per_head"] == 64
    lengths = {name: model["session_len"] for name, model in models.items()}
    assert lengths == {"new": 512, "no head size": 512, "window": 64, "shorter": 100, "yarn": 512}
    assert lengths == {name: manifest["session_len"] for name, manifest in manifests.items()}
    assert manifests["window"]["sliding_window"] == 64
    # lmdeploy alone would write 512 / 512 and 1 + 0.1 log 4.
    assert ropes["yarn"]["factor"] == 4.0
    assert ropes["yarn"]["attention_factor"] == pytest.approx((1 + 0.2 * np.log(4)) / (1 + 0.05 * np.log(4)))


def test_two_gpus_bfloat16_and_what_is_refused(hf, variant, tmp_path):
    folder, weights, _ = hf
    overflow = variant("overflow")
    from safetensors.torch import save_file

    save_file({**weights, "lm_head.weight": weights["lm_head.weight"] * 1e6}, f"{overflow}/model.safetensors")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").touch()
    jobs = [
        {"hf": str(folder), "dst": str(tmp_path / "tp2"), "options": {"tp": 2, "dtype": "bfloat16"}},
        {
            "hf": variant("window", sliding_window=64),
            "dst": str(tmp_path / "no"),
            "options": {"session_len": 65},
        },
        # Passes our own checks, but not lmdeploy's.
        {
            "hf": variant("old", architectures=["BaichuanForCausalLM"], num_attention_heads=40),
            "dst": str(tmp_path / "no"),
        },
        {"hf": variant("gpt2", architectures=["GPT2LMHeadModel"]), "dst": str(tmp_path / "no")},
        {"hf": variant("heads", head_dim=32), "dst": str(tmp_path / "no")},
        {"hf": str(folder), "dst": str(tmp_path / "no"), "options": {"tp": 4}},
        {"hf": str(folder), "dst": str(tmp_path / "no"), "options": {"chat_template": "nonsense"}},
        {"hf": variant("code", auto_map={"AutoConfig": "x.Y"}), "dst": str(tmp_path / "no")},
        {"hf": overflow, "dst": str(tmp_path / "kept")},
        {"hf": str(tmp_path / "absent"), "dst": str(tmp_path / "no")},
    ]
    done, *errors = run_driver(jobs)
    expected = [
        "turbomind.session_len: 64",
        "lmdeploy 0.9.2.post1 refuses",
        "does not support this architecture",
        "heads of size 32",
        "tp does not fit this model",
        "unknown chat template",
        "--trust-remote-code",
        "tensor lm_head.weight does not fit into float16",
        "not a Hugging Face model folder",
    ]
    assert done == "done"
    assert len(errors) == len(expected)
    for error, part in zip(errors, expected, strict=True):
        assert part in error
    assert "LlamaForCausalLM" in errors[2]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["old"]
    assert not (tmp_path / "no").exists()

    embedding = _bits(weights["model.embed_tokens.weight"])
    q, k, v = (_bits(weights[f"model.layers.1.self_attn.{name}_proj.weight"]).T for name in "qkv")
    for rank in range(2):
        share = _raw(tmp_path / "tp2", f"tok_embeddings.{rank}.weight", np.int16, HIDDEN // 2)
        # The rows are padded to a multiple of tp.
        padding = np.zeros((len(embedding) % 2, HIDDEN // 2), np.int16)
        own = embedding[:, rank * HIDDEN // 2 : (rank + 1) * HIDDEN // 2]
        assert np.array_equal(share, np.concatenate([own, padding]))
        # One query head per rank; both get the only KV head.
        qkv = [_rotary_pairs(q[:, rank * SIZE : (rank + 1) * SIZE], 1), _rotary_pairs(k, 1), v]
        raw = _raw(tmp_path / "tp2", f"layers.1.attention.w_qkv.{rank}.weight", np.int16, 3 * SIZE)
        assert np.array_equal(raw, np.concatenate(qkv, axis=1))


def test_the_training_environment_is_told_apart(run_script, tmp_path):
    """Run with the wrong Python, the script names the right one."""
    if importlib.util.find_spec("lmdeploy"):
        pytest.skip("lmdeploy is installed beside the training packages")
    (tmp_path / "config.json").write_text("{}")
    done = run_script("convert_hf_to_turbomind.py", "internlm2-chat-7b", tmp_path, check=False)
    assert (
        done.returncode == 2
        and ".venv-turbomind/bin/python" in done.stderr
        and "Traceback" not in done.stderr
    )
