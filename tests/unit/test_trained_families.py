"""DeepSpeed training of families with something of their own: the written model is the trained one.

LoRA on bases with a tied head and on experts, and a router with weights that stay in float32.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from export_models import extend_tokenizer, write_base
from pack_samples import write_bin
from snaketune.checkpoints.checkpoint_content import read_state_dict
from snaketune.encoding.tokenizer import rows_needed
from snaketune.export.hf_convert import convert
from snaketune.models.base_model import grow_to_tokenizer
from snaketune.models.lora import add_lora
from snaketune.training.train_config import load_config
from warm import PARENT

pytestmark = pytest.mark.slow

STEPS, RANKS = 3, 2
TIED = {"tie_word_embeddings": True}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0}
GEMMA4 = {"global_head_dim": 128, "hidden_size_per_layer_input": 0}  # layers with heads of their own
GEMMA4["rope_parameters"] = dict.fromkeys(
    ("full_attention", "sliding_attention"), {"rope_type": "default", "rope_theta": 54321.0}
)
LORA = ("--lora-rank", 2)
# name: (architecture, its settings, ZeRO stage, other flags of render_train_config.py)
WITH_LORA = {
    **{f"qwen2, zero{stage}": ("qwen2", TIED, stage, LORA) for stage in (1, 2, 3)},
    "gemma3, zero3": ("gemma3_text", TIED, 3, LORA),
    "gemma, zero2": ("gemma", TIED, 2, LORA),
    "gemma4, zero2": ("gemma4_text", TIED | GEMMA4, 2, LORA),
    "cohere2, zero1": ("cohere2", TIED, 1, LORA),
    "weights only": ("qwen2", TIED, 3, (*LORA, "--save-optimizer", "false")),
    "experts, zero2": ("mixtral", EXPERTS, 2, (*LORA, "--lora-experts", "true")),
    "experts, zero3": ("mixtral", EXPERTS, 3, (*LORA, "--lora-experts", "true")),
    "no experts": ("mixtral", EXPERTS, 2, (*LORA, "--lora-experts", "false")),
}
CASES = WITH_LORA | {
    f"ernie, zero{stage}": ("ernie4_5_moe", ERNIE, stage, ("--dtype", "bfloat16")) for stage in (2, 3)
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer_dir, run_script):
    """A folder with an extended tokenizer, tokenised documents with its new tokens, and the base models."""
    folder = tmp_path_factory.mktemp("lora")
    tokenizer = extend_tokenizer(tiny_tokenizer_dir, folder / "tokenizer")
    rng, size = np.random.RandomState(7), rows_needed(tokenizer.tokenizer)
    file = folder / "data/chatml_llamav13_32k/train/cn/one/chat.bin"
    samples = [
        np.append(rng.randint(3, size, rng.randint(4, 60)), size - 1 - rng.randint(6)).tolist()
        for _ in range(40)
    ]
    write_bin(file, samples)
    data = ("--train-folder", file.parents[2], "--max-length", 64, "--output", folder / "plan")
    run_script("plan_packing.py", *data)
    for kind, settings in {kind: settings for kind, settings, *_ in CASES.values()}.items():
        write_base(folder / kind, tiny_tokenizer_dir, kind, **settings)
    file = folder / "ernie4_5_moe/model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.endswith("e_score_correction_bias"):
            weights[name] = torch.full_like(weights[name], 0.1234567)  # which bfloat16 cannot hold
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def train(world, run_script, repo_root):
    """Trains a case and returns (finished process, run folder). `weights.pt` there has the weights in memory."""

    def start(case: str, *flags: object, code: int = 0, processes: int = RANKS, **environment: str):
        kind, _, stage, own = CASES[case]
        config, folder = world / f"{case}.py", world / case
        run_script(
            *("render_train_config.py", "--output", config, "--model-path", world / kind),
            *(
                "--tokenizer-path",
                world / "tokenizer",
                "--plan",
                world / "plan",
            ),
            *("--max-steps", STEPS, "--lr", 2e-2, "--global-batch", 2, "--zero-stage", stage),
            *own,
            *flags,
        )
        text = config.read_text().replace("custom_hooks = []", "custom_hooks = [dict(type=DumpWeights)]")
        config.write_text(
            text.replace("from torch.optim", "from train_hooks import DumpWeights\nfrom torch.optim")
        )
        environment |= {"PYTHONPATH": str(repo_root / "tests"), "OMP_NUM_THREADS": "1"}
        environment |= {"TEST_DUMP": str(world / f"{case}.pt")}
        command = [repo_root / "workflow_scripts/train_model.py", config, "--work-dir", folder]
        done = PARENT.run(
            [*command, "--processes", processes], timeout=300, env={**os.environ, **environment}
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-5000:]
        return done, folder

    return start


def trained_model(world: Path, case: str):
    """Returns the model of a run as its training left it in memory."""
    config = load_config(world / f"{case}.py")
    model = AutoModelForCausalLM.from_pretrained(config.model_path, attn_implementation="eager")
    new_ids, _ = grow_to_tokenizer(model, config.tokenizer_path, config.model_path)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    add_lora(model, config.lora, new_ids)
    model.load_state_dict(torch.load(world / f"{case}.pt", weights_only=True), strict=False)
    return base, model.eval()


@pytest.mark.parametrize("case", WITH_LORA)
def test_the_written_model_is_the_trained_one(case, world, train, monkeypatch, repo_root):
    done, folder = train(case)
    monkeypatch.syspath_prepend(repo_root / "tests")
    base, model = trained_model(world, case)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        convert(world / f"{case}.py", folder / f"iter_{STEPS}.pth", world / f"{case} hf")
        written = AutoModelForCausalLM.from_pretrained(
            world / f"{case} hf", attn_implementation="eager"
        ).eval()
        found = written(input_ids=ids, use_cache=False).logits
    expected = expected[..., : found.shape[-1]]  # rows without a token are not written
    torch.testing.assert_close(found, expected, atol=5e-4 * float(expected.std()), rtol=0)
    moved = {
        name
        for name, value in written.state_dict().items()
        if not torch.equal(value, base[name][: len(value)] if value.dim() else base[name])
    }
    assert "model.embed_tokens.weight" in moved and any(name.endswith("q_proj.weight") for name in moved)
    with_experts = any(".experts." in name for name in moved)
    assert with_experts == case.startswith("experts")

    # The log and the record say which layers are adapted, the log also which are not.
    adapts = json.loads((folder / "finished.json").read_text())["lora_adapts"]
    assert adapts["model.layers.*.self_attn.q_proj"] == 2
    assert ("model.layers.*.mlp.experts" in adapts) == with_experts
    adapted, frozen = done.stdout.partition("  adapted: ")[2].split("  frozen: ")
    assert all(f"{name} ({count})" in adapted for name, count in adapts.items())
    assert ("mlp.experts.gate_up_proj" in frozen.splitlines()[0]) == (case == "no experts")


def test_a_run_on_a_tied_base_goes_on_with_another_number_of_ranks(world, train):
    """From two ranks to one, from a checkpoint in the middle: the same losses as without the change."""
    case = "qwen2, zero2"
    shutil.rmtree(world / case, ignore_errors=True)  # another test may have trained it
    _, folder = train(case, "--save-steps", 1)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(folder / f"iter_{STEPS}.pth")
    (folder / "finished.json").unlink()
    done, _ = train(case, "--save-steps", 1, processes=1)
    assert "resuming after step 2" in done.stdout
    found = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line)["loss"] for line in lines]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITH_LORA])
def test_a_router_that_transformers_keeps_in_float32(case, world, train, monkeypatch, repo_root):
    """The correction of its scores is never trained, and stays as it is; its weights are written from fp32 copies."""
    base = load_file(world / "ernie4_5_moe/model.safetensors")
    done, folder = train(case)
    assert "Computes 2 weights in bfloat16 that transformers keeps in float32" in done.stdout
    assert "model.layers.*.mlp.gate.weight" in done.stdout
    state = read_state_dict(folder / f"iter_{STEPS}.pth")
    corrections = [name for name in state if name.endswith("e_score_correction_bias")]
    assert len(corrections) == 2 and all(state[name].dtype == torch.float32 for name in corrections)
    monkeypatch.syspath_prepend(repo_root / "tests")
    convert(world / f"{case}.py", folder / f"iter_{STEPS}.pth", world / f"{case} hf")
    written = load_file(world / f"{case} hf/model.safetensors")
    assert written.keys() == base.keys()
    in_float32 = {name for name, value in written.items() if value.dtype == torch.float32}
    assert {name.split("mlp.")[1] for name in in_float32} == {
        "gate.weight",
        "moe_statics.e_score_correction_bias",
    }
    for name in in_float32:
        assert torch.equal(written[name], base[name]) == name.endswith("e_score_correction_bias")
