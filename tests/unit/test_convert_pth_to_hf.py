"""Checkpoint -> Hugging Face folder: same weights, and the same model in transformers 4 and 5 and in lmdeploy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from environments import REPO
from export_models import (
    converter_python,
    extend_tokenizer,
    write_base,
    write_checkpoint,
    write_lora_checkpoint,
)
from snaketune.common.cli import UserError
from snaketune.common.files import read_json, sha256_file

pytestmark = pytest.mark.slow

TEXT = 'Hello  there\n<|im_start|>user\n你好 {"city": 25}<|im_end|>\n'
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 54321.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "mistral": {"kind": "mistral"},
    "tied": {"kind": "llama", "tie_word_embeddings": True},
    "scaled": {"kind": "llama", "rope_parameters": LLAMA3},
    "padded": {"kind": "mistral"},
    "mixture": {"kind": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory, tiny_tokenizer_dir):
    folder = tmp_path_factory.mktemp("extended")
    extend_tokenizer(tiny_tokenizer_dir, folder)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tiny_tokenizer_dir, tokenizer_dir):
    """{name: (Hugging Face folder, model in memory)} of each of `MODELS`; one with the rows that have no token."""
    from snaketune.encoding.tokenizer import load_tokenizer
    from snaketune.export.hf_convert import convert

    root, result = tmp_path_factory.mktemp("hf"), {}
    for name, settings in MODELS.items():
        base = write_base(root / name / "base", tiny_tokenizer_dir, **settings)
        config, checkpoint, model = write_checkpoint(base, tokenizer_dir, root / name)
        convert(
            config, checkpoint, root / name / "hf", **({"padded_vocab": "keep"} if name == "padded" else {})
        )
        if name != "padded":
            tokens = load_tokenizer(tokenizer_dir).vocab_size
            assert tokens < model.get_input_embeddings().weight.shape[0]
            model.resize_token_embeddings(tokens)
        result[name] = (root / name / "hf", model)
    return result


def _ids(folder) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids


def _logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_5_reads_the_model_that_was_in_memory(converted, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = converted[name]
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False).input_ids
    assert ids == _ids(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert loaded.dtype == torch.float32
    assert {n: v.shape for n, v in loaded.state_dict().items()} == {
        n: v.shape for n, v in model.state_dict().items()
    }
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(_logits(loaded, ids), _logits(model, ids), atol=1e-5, rtol=0)


def test_transformers_4_reads_the_same_model(converted, tmp_path):
    """Token ids, logits, rope and dtype in transformers 4.57, from one process in the converter's environment."""
    script = tmp_path / "read.py"
    script.write_text(
        "import json, sys, torch, transformers\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "text, result = sys.argv[1], {'version': transformers.__version__}\n"
        "for folder in sys.argv[2:]:\n"
        "    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder).eval()\n"
        "    with torch.no_grad():\n"
        "        logits = model(input_ids=torch.tensor([ids])).logits[0]\n"
        "    result[folder] = {'ids': ids, 'logits': logits.tolist(), 'rope_theta': model.config.rope_theta,\n"
        "                      'rope_scaling': model.config.rope_scaling, 'dtype': str(model.config.torch_dtype)}\n"
        "print(json.dumps(result))\n"
    )
    folders = [str(folder) for folder, _ in converted.values()]
    command = [converter_python(), "-W", "ignore", str(script), TEXT, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["version"].startswith("4.57.")
    for name, (folder, model) in converted.items():
        read = result[str(folder)]
        assert read["ids"] == _ids(folder)
        assert read["rope_theta"] == 54321.0 and read["dtype"] == "torch.float32"
        assert (read["rope_scaling"] or {}).get("rope_type") == ("llama3" if name == "scaled" else None)
        torch.testing.assert_close(
            torch.tensor(read["logits"]), _logits(model, read["ids"]), atol=1e-5, rtol=0
        )


def test_the_folder_is_complete_and_described(converted, tokenizer_dir):
    folder, model = converted["mistral"]
    config, generation, manifest = (
        read_json(folder / name) for name in ("config.json", "generation_config.json", "manifest.json")
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 54321.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["architectures"] == ["MistralForCausalLM"] and config["use_cache"]
    rows = model.get_input_embeddings().weight.shape[0]
    assert config["vocab_size"] == manifest["vocab_size"] == rows and rows % 64 != 0
    assert read_json(converted["padded"][0] / "config.json")["vocab_size"] == -(-rows // 64) * 64
    ids = read_json(tokenizer_dir / "manifest.json")["ids"]
    assert generation["eos_token_id"] == [ids["<|im_end|>"], 2]
    assert "chat_template" in read_json(folder / "tokenizer_config.json")
    assert manifest["tokenizer_sha256"] == sha256_file(tokenizer_dir / "tokenizer.json")
    listed = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == listed
    assert all(entry["sha256"] == sha256_file(folder / name) for name, entry in manifest["files"].items())


def _sampled(folder, count: int) -> torch.Tensor:
    """Returns ids that transformers samples from a folder at temperature 2, in texts of 100 ids."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    settings = {
        "do_sample": True,
        "temperature": 2.0,
        "top_k": 0,
        "min_new_tokens": 100,
        "max_new_tokens": 100,
    }
    ids = model.generate(torch.ones(count // 100, 1, dtype=torch.long), pad_token_id=0, **settings)
    return ids[:, 1:].flatten()


def test_no_id_without_a_token_can_be_sampled(converted, tokenizer_dir):
    """Untied heads. The padded folder shows that such ids would come."""
    from snaketune.encoding.tokenizer import load_tokenizer

    tokens = load_tokenizer(tokenizer_dir).vocab_size
    ids = {name: _sampled(converted[name][0], 10_000) for name in ("mistral", "padded")}
    assert all(len(each) == 10_000 for each in ids.values())
    assert (ids["padded"] >= tokens).any()
    assert ids["mistral"].max() < tokens


def test_a_padding_token_outside_the_tokenizer_keeps_its_row(tiny_tokenizer_dir, tokenizer_dir, tmp_path):
    """Otherwise transformers could not load the folder."""
    from transformers import AutoModelForCausalLM

    from snaketune.encoding.tokenizer import load_tokenizer
    from snaketune.export.hf_convert import convert

    tokens = load_tokenizer(tokenizer_dir).vocab_size
    base = write_base(tmp_path / "base", tiny_tokenizer_dir, vocab_size=tokens + 30, pad_token_id=tokens + 9)
    config, checkpoint, _ = write_checkpoint(base, tokenizer_dir, tmp_path)
    convert(config, checkpoint, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == tokens + 10
    assert model.config.pad_token_id == tokens + 9


def test_dtype_shards_and_equal_bytes(converted, tmp_path):
    from transformers import AutoModelForCausalLM

    from snaketune.export.hf_convert import convert

    folder, model = converted["mistral"]
    run = folder.parent
    for copy in ("a", "b"):
        convert(
            run / "train_config.py",
            run / "iter_7.pth",
            tmp_path / copy,
            dtype="bfloat16",
            max_shard_size="100KB",
        )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert (
        sum(name.endswith(".safetensors") for name in names) > 1 and "model.safetensors.index.json" in names
    )
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(v.bfloat16(), loaded.state_dict()[n]) for n, v in model.state_dict().items())


def test_auto_is_the_dtype_of_the_training(converted, tmp_path, monkeypatch):
    """ZeRO keeps fp32 copies of a bf16 model, so the tensors' dtype proves nothing."""
    from snaketune.export.checkpoint_source import find_checkpoint
    from snaketune.export.hf_convert import convert

    folder, _ = converted["mistral"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "iter_7.pth").write_bytes((folder.parent / "iter_7.pth").read_bytes())
    (run / "identity.json").write_text(json.dumps({"fields": {"dtype": "bfloat16"}}))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    manifest = convert(folder.parent / "train_config.py", run / "iter_7.pth", tmp_path / "hf")
    assert manifest["dtype"] == "bfloat16" and manifest["slurm_job_id"] == "4711"
    record = {"checkpoint": "run/iter_7.pth", "weights_sha256": "0" * 64, "dtype": "float32"}
    (tmp_path / "train.json").write_text(json.dumps(record))
    assert find_checkpoint(tmp_path / "train.json") == (run / "iter_7.pth", record)
    with pytest.raises(UserError, match="do not match train.json"):
        convert(folder.parent / "train_config.py", tmp_path / "train.json", tmp_path / "hf")
    assert read_json(tmp_path / "hf" / "manifest.json") == manifest


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_killed_conversion_keeps_its_finished_files(converted, tokenizer_dir, tmp_path, run_script, kind):
    """Killed at the tenth tensor. Keeps finished files, and ends with the bytes of an uninterrupted conversion."""
    run = converted["mistral"][0].parent
    if kind == "lora":
        write_lora_checkpoint(run / "base", tokenizer_dir, tmp_path)
        run = tmp_path
    command = (run / "train_config.py", run / "iter_7.pth", "--max-shard-size", "100KB")
    run_script("convert_pth_to_hf.py", *command, tmp_path / "whole")
    killed = f"""
import os, sys
sys.path.insert(0, {str(REPO / "workflow_scripts")!r})
from pathlib import Path
from snaketune.export import hf_convert, weight_shards
seen, check = set(), weight_shards.require_in_range
def require(name, *rest):
    seen.add(name)
    if len(seen) == 10:
        os._exit(9)
    check(name, *rest)
weight_shards.require_in_range = require
config, pth, _, size = sys.argv[1:5]
hf_convert.convert(Path(config), Path(pth), Path(sys.argv[5]), max_shard_size=size)
"""
    done = subprocess.run(
        [sys.executable, "-c", killed, *map(str, command), str(tmp_path / "hf")], check=False
    )
    assert done.returncode == 9 and not (tmp_path / "hf").exists()
    partial = tmp_path / ".hf.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert finished and set(read_json(partial / "shards.json")["files"]) == set(finished)
    again = run_script("convert_pth_to_hf.py", *command, tmp_path / "hf")
    assert f"{len(finished)} of " in again.stdout and "already finished" in again.stdout
    assert all((tmp_path / "hf" / name).stat().st_mtime_ns == time for name, time in finished.items())
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "hf").iterdir()) and not partial.exists()
    assert all(
        (tmp_path / "hf" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names
    )


def test_weights_in_pieces_are_written_whole(tmp_path, monkeypatch):
    """Two ranks of ZeRO-3, with chunks that end within tensors and extents; safetensors reads the result."""
    from safetensors.torch import load_file

    from snaketune.checkpoints import stored_tensors
    from snaketune.checkpoints.weights_digest import weights_digest
    from snaketune.checkpoints.zero_weights import read_zero_state_dict
    from snaketune.export.weight_shards import Output, write_shards

    monkeypatch.setattr(stored_tensors, "CHUNK", 5)
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3), "c": torch.randn(4, 9)}
    shapes = [{name: tensor.shape for name, tensor in tensors.items()}]
    torch.save({"module": {}, "param_shapes": shapes}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank in range(2):
        parts = [
            torch.cat([t.flatten(), t.new_zeros(t.numel() % 2)]).chunk(2)[rank] for t in tensors.values()
        ]
        state = {"zero_stage": 3, "fp32_flat_groups": [torch.cat(parts[:2]), parts[2]]}
        torch.save(
            {"optimizer_state_dict": state}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    state = read_zero_state_dict(tmp_path)
    outputs = {name: Output(stored, torch.bfloat16) for name, stored in state.stored.items()}
    outputs["c"] = Output(state.stored["c"], torch.float32, rows=3)
    (tmp_path / "out").mkdir()
    files, digest = write_shards(outputs, tmp_path / "out", "80B", state)
    assert digest == weights_digest(tensors) and len(files) == 2
    assert all(sha256_file(tmp_path / "out" / name) == entry["sha256"] for name, entry in files.items())
    read = {name: tensor for file in files for name, tensor in load_file(tmp_path / "out" / file).items()}
    assert torch.equal(read["a"], tensors["a"].bfloat16()) and torch.equal(read["b"], tensors["b"].bfloat16())
    assert torch.equal(read["c"], tensors["c"][:3])


def _seal_checkpoint(run, step):
    pth = run / f"iter_{step}.pth"
    pth.mkdir(parents=True)
    torch.save({"state_dict": {"llm.w": torch.full((4,), float(step))}}, pth / "weights.pt")
    entry = {"bytes": (pth / "weights.pt").stat().st_size, "sha256": sha256_file(pth / "weights.pt")}
    (pth / "COMPLETE.json").write_text(json.dumps({"files": {"weights.pt": entry}}))
    return pth


def test_the_newest_checkpoint_of_a_training_that_goes_on(tmp_path, monkeypatch):
    """If training removes a checkpoint while it is opened, the next one is used. One removed later stays readable."""
    from snaketune.checkpoints import checkpoint_content
    from snaketune.checkpoints.checkpoint_folders import is_intact, prune_checkpoints
    from snaketune.export.checkpoint_source import find_run, open_checkpoint

    run = tmp_path / "results" / "checkpoints" / "0a1b2c"
    _seal_checkpoint(run, 2)
    (run / "identity.json").write_text("{}")
    assert find_run(tmp_path / "results") == find_run(run) == (run / "train_config.py", run)
    with pytest.raises(UserError, match="is not a run"):
        find_run(tmp_path)

    def save_and_prune(pth, *rest):
        result = is_intact(pth, *rest)
        monkeypatch.setattr(checkpoint_content, "is_intact", is_intact)
        _seal_checkpoint(run, 4)
        prune_checkpoints(run, 1)
        return result

    monkeypatch.setattr(checkpoint_content, "is_intact", save_and_prune)
    checkpoint, _, state = open_checkpoint(run)
    assert checkpoint.name == "iter_4.pth"
    _seal_checkpoint(run, 6)
    prune_checkpoints(run, 1)
    assert not checkpoint.exists() and torch.equal(state["w"], torch.full((4,), 4.0))
    monkeypatch.setattr(checkpoint_content, "is_intact", lambda pth: shutil.rmtree(pth) or True)
    with pytest.raises(UserError, match="was removed while it was being read"):
        open_checkpoint(run / "iter_6.pth")


@pytest.mark.parametrize(("value", "advice"), [(70000.0, "bfloat16"), (float("nan"), "diverged")])
def test_values_that_do_not_fit_are_named_and_the_old_folder_stays(converted, tmp_path, value, advice):
    from snaketune.export.hf_convert import convert

    folder, _ = converted["mistral"]
    content = torch.load(folder.parent / "iter_7.pth", weights_only=True)
    content["state_dict"]["llm.model.layers.1.mlp.up_proj.weight"][3, 5] = value
    torch.save(content, tmp_path / "iter_7.pth")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "old").touch()
    with pytest.raises(UserError, match=rf"(?s)layers\.1\.mlp\.up_proj\.weight.*{advice}"):
        convert(folder.parent / "train_config.py", tmp_path / "iter_7.pth", tmp_path / "hf", dtype="float16")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["old"]


def test_a_checkpoint_of_another_model_is_refused(converted, tmp_path):
    from snaketune.export.hf_convert import convert

    config = converted["mistral"][0].parent / "train_config.py"
    with pytest.raises(UserError, match="no complete checkpoint"):
        convert(config, tmp_path, tmp_path / "hf")
    content = torch.load(config.parent / "iter_7.pth", weights_only=True)
    content["state_dict"]["llm.model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)
    torch.save(content, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"(?s)does not belong to the base model.*layers\.2"):
        convert(config, tmp_path / "more.pth", tmp_path / "hf")
    del (
        content["state_dict"]["llm.model.layers.2.mlp.up_proj.weight"],
        content["state_dict"]["llm.model.norm.weight"],
    )
    torch.save(content, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        convert(config, tmp_path / "less.pth", tmp_path / "hf")


def test_two_rope_bases_are_refused():
    from snaketune.export.hf_config import portable_config, rope_of

    with pytest.raises(UserError, match="two rope bases"):
        rope_of({"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}})
    old = {
        "rope_theta": 500000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "float16",
    }
    new = portable_config({**old, "quantization_config": {"quant_method": "fp8"}}, "bfloat16")
    assert new == {**old, "dtype": "bfloat16", "torch_dtype": "bfloat16"}


def test_a_real_training_run_as_the_guide_converts_it(
    tmp_path, tiny_model_dir, tokenizer_dir, write_processed, run_script
):
    """ZeRO-2 training, then `convert_pth_to_hf.py CONFIG PTH DST`, compared with DeepSpeed's own reader."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    talk = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "I am fine, thank you. " * 3},
    ]
    data = write_processed(tmp_path / "data", {"talks": [talk] * 12})
    run_script(
        *("tokenize_dataset.py", "--processed-dir", data, "--tokenized-dir", tmp_path / "tokens"),
        *("--tokenizer-path", tokenizer_dir),
    )
    run_script(
        *("render_train_config.py", "--output", tmp_path / "config.py", "--model-path", tiny_model_dir),
        *("--tokenizer-path", tokenizer_dir, "--train-folder", tmp_path / "tokens/chatml_llamav13_32k/train"),
        *("--max-length", 64, "--max-steps", 2, "--lr", "1e-2", "--zero-stage", 2),
    )
    run_script(
        "train_model.py",
        tmp_path / "config.py",
        "--work-dir",
        tmp_path / "run",
        "--manifest",
        tmp_path / "train.json",
    )
    pth = tmp_path / "run" / "iter_2.pth"
    run_script("convert_pth_to_hf.py", tmp_path / "config.py", pth, tmp_path / "hf")
    reference = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "run"), tag="iter_2.pth")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert {f"llm.{name}" for name in written} == set(reference)
    tokens = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).get_vocab_size()
    assert len(written["lm_head.weight"]) == len(written["model.embed_tokens.weight"]) == tokens
    assert all(torch.equal(value, reference[f"llm.{name}"][: len(value)]) for name, value in written.items())
    refused = run_script(
        "convert_pth_to_hf.py", tmp_path / "config.py", tmp_path / "none", tmp_path / "x", check=False
    )
    assert (
        refused.returncode == 2 and "does not exist" in refused.stderr and "Traceback" not in refused.stderr
    )
