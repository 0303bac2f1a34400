"""The exported folder and its gate for many families: bases as published, read by transformers 5 and 4."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from environments import REPO
from export_models import converter_python, extend_tokenizer, write_checkpoint, write_lora_checkpoint
from families import EAGER, FAMILIES, write_family
from snaketune.common.cli import UserError
from snaketune.common.files import read_json, write_json

pytestmark = pytest.mark.slow

PROMPTS = [[1, *range(5, 95, 2)], [1, *range(300, 320)]]
UNKNOWN = ("ministral3", "gemma4_text")  # to transformers 4
LIMITS = {
    "mistral": {"sliding_window": 300},
    "gemma2": {"sliding_window": 200},
    "gemma3_text": {"sliding_window": 200},
    "gemma3": {"sliding_window": 200},
    "gpt_oss": {"sliding_window": 200},
    "gemma4_text": {"sliding_window": 200},
    "llama4_text": {"attention_chunk_size": 200},
    "phi3": {"original_max_position_embeddings": 256},
}
# Bases whose config.json transformers 5 has written: it must be spelled in both ways.
RESPELLED = ("llama", "qwen3_moe", "gemma3_text", "gemma3", "phi3", "glm4_moe", "gpt_neox", "gpt_oss")
FORGETFUL = "mistral without rope_theta"
READ_IN_4 = f"""
import json, sys
sys.path.insert(0, {str(REPO / "workflow_scripts")!r})
from pathlib import Path
from snaketune.parity.model_logits import folder_logits, prompts_batch, top_values
from snaketune.parity.prompt_readers import read_logits
prompts, result = json.loads(sys.argv[1]), {{}}
for name in sys.argv[2:]:
    result[name] = read_logits(Path(name), prompts)
    if result[name]["unread"] is None:
        attention = "eager" if "gemma2" in name else None  # sdpa has no cap of the scores
        (logits,) = folder_logits(Path(name), [prompts_batch(prompts)], attention=attention, memory=0)
        result[name]["from disk"] = top_values(logits)
print(json.dumps(result))
"""


@dataclass
class World:
    """One family: its folders, the trained model in memory, and what transformers 4 reads from `hf`."""

    base: Path
    config: Path
    checkpoint: Path
    hf: Path
    model: Any
    reading: dict | None = None

    def gate(self, hf: Path | None = None, reading: dict | None = None, checkpoint: Path | None = None):
        """Returns the logits' part of the gate."""
        from snaketune.parity.logit_parity import compare_models, trained_weights
        from snaketune.training.train_config import load_config

        config = load_config(self.config)
        state = trained_weights(config, checkpoint or self.checkpoint, {})
        return compare_models(config, state, hf or self.hf, None, PROMPTS, reading or self.reading)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, tiny_tokenizer_dir):
    """{name: World} of all families, those of `RESPELLED` also as "<name> respelled", and `FORGETFUL`."""
    from snaketune.export.hf_config import tuned_config
    from snaketune.export.hf_convert import convert

    python, root = converter_python(), tmp_path_factory.mktemp("families")
    tokens = extend_tokenizer(tiny_tokenizer_dir, root / "tokenizer").vocab_size
    worlds = {}
    for name in FAMILIES:
        base = write_family(root / name / "base", tiny_tokenizer_dir, name)
        attention = "eager" if name in EAGER else "auto"
        config, checkpoint, model = write_checkpoint(base, root / "tokenizer", root / name, attention)
        convert(config, checkpoint, root / name / "hf")
        model.resize_token_embeddings(tokens)  # the others are not written
        worlds[name] = World(base, config, checkpoint, root / name / "hf", model)
    for name in RESPELLED:
        plain, hf = worlds[name], root / name / "respelled"
        shutil.copytree(plain.hf, hf)
        model = plain.model
        model.config.save_pretrained(hf)
        written = tuned_config(read_json(hf / "config.json"), model, "float32")
        write_json(hf / "config.json", written)
        worlds[f"{name} respelled"] = World(plain.base, plain.config, plain.checkpoint, hf, model)
    plain = worlds["mistral"]
    hf = shutil.copytree(plain.hf, root / "mistral" / "forgetful")
    written = read_json(hf / "config.json")
    written["rope_parameters"] = {"rope_type": "default", "rope_theta": written.pop("rope_theta")}
    write_json(hf / "config.json", written)
    worlds[FORGETFUL] = World(plain.base, plain.config, plain.checkpoint, hf, plain.model)
    command = [python, "-W", "ignore", "-c", READ_IN_4, json.dumps(PROMPTS)]
    command += [str(each.hf) for each in worlds.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    readings = json.loads(done.stdout.splitlines()[-1])
    for each in worlds.values():
        each.reading = readings[str(each.hf)]
    return worlds


@pytest.mark.parametrize("name", [*FAMILIES, *(f"{name} respelled" for name in RESPELLED)])
def test_checkpoint_and_folder_agree_in_both_lines_of_transformers(worlds, name):
    world = worlds[name]
    gate = world.gate()
    limits = LIMITS.get(name.removesuffix(" respelled"), {})
    assert gate["limits"] == limits
    five, *four = gate["logits"]
    assert (five["of"], five["against"]) == ("Hugging Face", "checkpoint")
    assert five["tokens"] == max(46, *(limit + 64 for limit in limits.values()), 0)
    assert five["relative_difference"] < 1e-6 and five["top1_agreement"] == 1.0
    if name in UNKNOWN:
        (unread,) = gate["unread"]
        assert four == [] and name in unread["why"] and unread["reader"].startswith("transformers 4.")
        return
    assert gate["unread"] == [] and four[0]["of"].startswith("transformers 4.57.")
    assert four[0]["relative_difference"] < 1e-5 and four[0]["tokens"] == five["tokens"]
    on_disk = {**world.reading, "prompts": world.reading["from disk"]}
    assert world.gate(reading=on_disk)["logits"][1]["relative_difference"] < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_references_give_the_logits_of_the_trained_model(worlds, name):
    """The model in memory; a checkpoint in an empty model; the folder in memory, and with its weights on disk."""
    from snaketune.checkpoints.checkpoint_content import read_state_dict
    from snaketune.parity.model_logits import checkpoint_logits, folder_logits, prompts_batch

    world = worlds[name]
    attention = world.model.config._attn_implementation
    with torch.no_grad():
        each = [world.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in PROMPTS]
    expected, batch = torch.cat(each), [prompts_batch(PROMPTS)]
    assert expected.std() > 0.5
    state = read_state_dict(world.checkpoint)
    found = {
        "checkpoint": checkpoint_logits(str(world.base), state, batch, attention=attention),
        "memory": folder_logits(world.hf, batch, attention=attention),
        "disk": folder_logits(world.hf, batch, attention=attention, memory=0),
    }
    for how, (logits,) in found.items():
        torch.testing.assert_close(
            logits[:, : expected.shape[1]] if how == "checkpoint" else logits,
            expected,
            atol=1e-4,
            rtol=1e-4,
            msg=lambda text, how=how: how + text,
        )


@pytest.mark.parametrize("name", ["gemma", "mixtral"])
def test_one_layer_at_a_time_is_in_memory(worlds, name):
    from transformers import AutoConfig

    from snaketune.checkpoints.checkpoint_content import read_state_dict
    from snaketune.parity.layerwise import empty_with_buffers, load_as_it_runs

    state = read_state_dict(worlds[name].checkpoint)
    config = AutoConfig.from_pretrained(worlds[name].hf, vocab_size=len(state["model.embed_tokens.weight"]))
    model, held = empty_with_buffers(config), []
    parts = [model.model.embed_tokens, *model.model.layers, model.lm_head]
    sizes = [sum(each.numel() for each in part.parameters()) for part in parts]
    load_as_it_runs(model, state)
    for part in parts:
        part.register_forward_hook(
            lambda *_: held.append(sum(each.numel() for each in model.parameters() if not each.is_meta))
        )
    model(input_ids=torch.tensor(PROMPTS[:1]), use_cache=False)
    norm = model.model.norm.weight.numel()
    assert held == [size + norm for size in sizes]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_is_the_bases_own(worlds, name):
    world = worlds[name]
    base, written = (read_json(folder / "config.json") for folder in (world.base, world.hf))
    rows = world.model.get_input_embeddings().weight.shape[0]
    text = base.get("text_config", base)
    assert text["vocab_size"] < rows
    text |= {key: rows for key in text if key.startswith("vocab_size")}
    base["dtype"] = base["torch_dtype"]
    assert written == base
    ends = read_json(world.hf / "generation_config.json")["eos_token_id"]
    assert 2 in ends and len(ends) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tensors_have_the_names_of_the_bases_files(worlds, name):
    """transformers 4 finds the vision tower of Gemma 3 under no other name."""
    from snaketune.checkpoints.safetensors_files import open_safetensors

    base, hf = (set(open_safetensors(folder)) for folder in (worlds[name].base, worlds[name].hf))
    assert hf == base


def test_dtypes_are_those_of_the_weights_in_every_part(worlds, tmp_path):
    from safetensors.torch import load_file

    from snaketune.export.hf_convert import convert

    world = worlds["gemma3"]
    convert(world.config, world.checkpoint, tmp_path / "hf", dtype="bfloat16")
    written = read_json(tmp_path / "hf" / "config.json")
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["text_config"]["torch_dtype"] == written["vision_config"]["torch_dtype"] == "bfloat16"
    assert {each.dtype for each in load_file(tmp_path / "hf/model.safetensors").values()} == {torch.bfloat16}
    (row,) = world.gate(tmp_path / "hf", {"reader": "none", "unread": "not read"})["logits"]
    assert row["dtype"] == "bfloat16" and row["relative_difference"] < 1e-6 < row["rounding_difference"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"sliding_window": None}),  # which only the long prompt shows
        ("phi3", {"original_max_position_embeddings": 512}),
        ("gemma3_text", {"rope_local_base_freq": 700.0}),
        ("glm4_moe", {"partial_rotary_factor": 0.5}),
        ("jamba", {"rms_norm_eps": 0.1}),
    ],
)
def test_a_config_that_means_something_else_stops_the_gate(worlds, tmp_path, name, change):
    hf = shutil.copytree(worlds[name].hf, tmp_path / "hf")
    write_json(hf / "config.json", {**read_json(hf / "config.json"), **change})
    with pytest.raises(UserError, match="Hugging Face gives different logits than the checkpoint"):
        worlds[name].gate(hf)


def test_a_config_that_only_transformers_4_misreads_stops_the_gate(worlds):
    """It takes a rope base of 10,000 for one that it does not find."""
    with pytest.raises(
        UserError, match=r"(?s)transformers 4\.57\.\d+ gives different logits.*transformers 5"
    ):
        worlds[FORGETFUL].gate()


def test_a_kernel_of_a_gpu_is_replaced_where_the_gate_runs(worlds, tmp_path):
    """Trained with flash attention, which has no CPU version; gemma2's caps have none in sdpa either."""
    world = worlds["gemma2"]
    text = world.config.read_text()
    for attention in ("auto", "flash_attention_2"):
        config = tmp_path / f"{attention}.py"
        config.write_text(text.replace("'eager'", f"'{attention}'"))
        assert config.read_text() != text
        gate = World(world.base, config, world.checkpoint, world.hf, world.model, world.reading).gate()
        assert all(row["relative_difference"] < 1e-5 for row in gate["logits"])


@pytest.mark.parametrize("name", ["mixtral", "gemma", "gpt_oss", "qwen3_moe"])
def test_lora_runs_pass_the_gate(worlds, tmp_path, name):
    """Experts, a tied head, and a base that sdpa does not load."""
    from snaketune.export.hf_convert import convert

    world = worlds[name]
    attention = "eager" if name in EAGER else "auto"
    tokenizer = world.base.parents[1] / "tokenizer"
    config, checkpoint, tuner = write_lora_checkpoint(
        world.base, tokenizer, tmp_path / "run", attention=attention
    )
    convert(config, checkpoint, tmp_path / "hf")
    lora = World(world.base, config, checkpoint, tmp_path / "hf", tuner)
    (row,) = lora.gate(reading={"reader": "none", "unread": "not read"})["logits"]
    assert row["relative_difference"] < 1e-5
    with pytest.raises(UserError, match="different logits"):
        lora.gate(world.hf, {"reader": "none", "unread": "not read"})
