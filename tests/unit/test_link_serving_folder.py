"""The folder for lmdeploy >= 0.10: same weights, and a Mistral that its TurboMind engine accepts as a Llama."""

from __future__ import annotations

import shutil

import pytest
import torch

from export_models import extend_tokenizer, write_base, write_checkpoint
from snaketune.common.cli import UserError
from snaketune.common.files import read_json, sha256_file, write_json
from snaketune.export.lmdeploy_folder import make_serving_folder
from snaketune.serving.lmdeploy_engines import as_llama


@pytest.fixture(scope="module")
def hf(tmp_path_factory, tiny_tokenizer_dir):
    """Hugging Face folder of a tuned Mistral without a sliding window."""
    from snaketune.export.hf_convert import convert

    root = tmp_path_factory.mktemp("direct")
    extend_tokenizer(tiny_tokenizer_dir, root / "tokenizer")
    base = write_base(root / "base", tiny_tokenizer_dir, sliding_window=None)
    config, checkpoint, _ = write_checkpoint(base, root / "tokenizer", root / "run")
    convert(config, checkpoint, root / "hf")
    return root / "hf"


def test_a_mistral_is_served_as_the_llama_that_computes_the_same(hf, tmp_path, run_script):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_script("link_serving_folder.py", hf, tmp_path / "served", "--model-name", "mine", "--tp", 2)
    served = tmp_path / "served"
    ids = AutoTokenizer.from_pretrained(served)("<|im_start|>user\nHello", return_tensors="pt").input_ids
    with torch.no_grad():
        trained, linked = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
            for folder in (hf, served)
        )
    assert read_json(hf / "config.json")["model_type"] == "mistral"
    assert read_json(served / "config.json")["model_type"] == "llama"
    torch.testing.assert_close(linked, trained, atol=1e-6, rtol=0)
    assert (served / "model.safetensors").samefile(hf / "model.safetensors")
    command = (served / "serve.txt").read_text()
    assert command.startswith("lmdeploy serve api_server ") and "--backend turbomind --tp 2" in command
    assert "--model-name mine" in command and "--tool-call-parser internlm" in command
    manifest = read_json(served / "manifest.json")
    assert manifest["hf_weights_sha256"] == read_json(hf / "manifest.json")["weights_sha256"]
    files = manifest["files"]
    assert set(files) == {path.name for path in served.iterdir()} - {"manifest.json"}
    assert all(sha256_file(served / name) == entry["sha256"] for name, entry in files.items())


def test_a_window_stays_a_mistral_and_runs_on_the_other_engine():
    from snaketune.serving.commands import lmdeploy_command

    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    assert as_llama(config) == config
    assert "--backend pytorch" in lmdeploy_command("served", "mine", "MistralForCausalLM")
    # transformers uses a window where the file names none.
    assert (
        as_llama({"model_type": "mistral", "architectures": ["MistralForCausalLM"]})["model_type"]
        == "mistral"
    )


def test_a_window_that_turbomind_ignores_limits_the_session(hf, tmp_path):
    """Qwen2 stays on TurboMind, which computes full attention for it."""
    qwen = shutil.copytree(hf, tmp_path / "qwen")
    config = read_json(qwen / "config.json") | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    write_json(qwen / "config.json", config | window)
    manifest = make_serving_folder(qwen, tmp_path / "served", model_name="mine")
    assert manifest["session_len"] == 64
    command = (tmp_path / "served" / "serve.txt").read_text()
    assert "--backend turbomind" in command and "--session-len 64" in command
    with pytest.raises(UserError, match=r"turbomind.session_len: 64"):
        make_serving_folder(qwen, tmp_path / "no", model_name="mine", session_len=65)
    assert not (tmp_path / "no").exists()


def test_an_architecture_without_an_engine_gets_no_folder(hf, tmp_path, run_script):
    granite = shutil.copytree(hf, tmp_path / "granite")
    config = read_json(granite / "config.json") | {"architectures": ["GraniteForCausalLM"]}
    write_json(granite / "config.json", config)
    done = run_script(
        "link_serving_folder.py", granite, tmp_path / "served", "--model-name", "mine", check=False
    )
    assert done.returncode == 2 and "GraniteForCausalLM" in done.stderr
    assert not (tmp_path / "served").exists()
