"""The parity check, on real conversions of a tiny model by the real converter."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from environments import REPO
from export_models import converter_python, extend_tokenizer, write_base, write_checkpoint
from snaketune.common.files import read_json, write_json

pytestmark = pytest.mark.slow

SCRIPTS = REPO / "workflow_scripts"


@pytest.fixture(scope="module")
def chain(tmp_path_factory, tiny_tokenizer_dir):
    """Folder with train_config.py, a checkpoint, hf/, turbomind/ and readings.json of one tiny model."""
    from snaketune.export.hf_convert import convert

    python = converter_python()
    root = tmp_path_factory.mktemp("parity")
    extend_tokenizer(tiny_tokenizer_dir, root / "tokenizer")
    base = write_base(root / "base", tiny_tokenizer_dir)
    config, checkpoint, _ = write_checkpoint(base, root / "tokenizer", root / "run")
    convert(config, checkpoint, root / "hf")
    for command in (
        ("convert_hf_to_turbomind.py", "internlm2-chat-7b", root / "hf", "--dst-path", root / "turbomind"),
        ("encode_prompts.py", root / "turbomind", "--hf", root / "hf", "--output", root / "readings.json"),
    ):
        done = subprocess.run(
            [python, str(SCRIPTS / command[0]), *map(str, command[1:])],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return root


def check(chain, run_script, output, hf=None, check=True):
    return run_script(
        "check_parity.py",
        *(chain / "run/train_config.py", chain / "run/iter_7.pth", hf or chain / "hf"),
        *("--turbomind", chain / "turbomind", "--readings", chain / "readings.json", "--output", output),
        check=check,
    )


def test_an_honest_chain_passes_and_every_difference_is_listed_and_explained(chain, run_script, tmp_path):
    done = check(chain, run_script, tmp_path / "parity.json")
    gate = read_json(tmp_path / "parity.json")
    hf, older, turbomind = gate["logits"]
    assert older["of"].startswith("transformers 4.57.") and gate["unread"] == []
    assert hf["relative_difference"] < 1e-6
    assert max(older["relative_difference"], turbomind["relative_difference"]) < 1e-5
    assert hf["top1_agreement"] == older["top1_agreement"] == turbomind["top1_agreement"] == 1.0
    assert hf["rounding_difference"] == 0.0 < turbomind["rounding_difference"] < 0.01
    assert gate["turbomind"]["tensors"] == len(load_file(chain / "hf/model.safetensors"))

    five, openai, four, own_system, silent, calls = gate["ids"]
    assert five["reader"].startswith("transformers 5.") and four["reader"].startswith("transformers 4.")
    assert openai["reader"].endswith("OpenAI's tools")
    for row in (five, openai, four, silent):
        assert row["equal"] == row["prompts"] and not row["differences"], row
    # lmdeploy's own habits: a system message if there is none, no line break after a tool call.
    assert [each["prompt"] for each in own_system["differences"]] == [1]
    assert own_system["differences"][0]["reader"].startswith("system\nYou are an AI assistant")
    assert "meta_instruction" in own_system["differences"][0]["why"]
    assert [each["prompt"] for each in calls["differences"]] == [3]
    assert "line break" in calls["differences"][0]["why"]
    assert "parity holds" in done.stdout and "why: lmdeploy" in done.stdout


def test_tokens_beyond_a_session_of_turbomind_are_not_compared(chain, run_script, tmp_path):
    """The engine never sees them, and beyond a sliding window it would compute something else."""
    copy = shutil.copytree(chain, tmp_path / "chain")
    path = copy / "turbomind" / "triton_models" / "weights" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model_config"]["session_len"] = 20
    path.write_text(yaml.safe_dump(config))
    check(copy, run_script, tmp_path / "parity.json")
    hf, _, turbomind = read_json(tmp_path / "parity.json")["logits"]
    assert hf["tokens"] > turbomind["tokens"] == 20
    assert turbomind["relative_difference"] < 1e-5 and turbomind["rounding_difference"] > 0


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral_instruct"])
def test_other_templates_pass_under_the_exact_mask(tmp_path, tiny_tokenizer_dir, run_script, template):
    from snaketune.export.hf_convert import convert

    extend_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer", template)
    base = write_base(tmp_path / "base", tiny_tokenizer_dir)
    config, checkpoint, _ = write_checkpoint(base, tmp_path / "tokenizer", tmp_path / "run")
    convert(config, checkpoint, tmp_path / "hf")
    command = ("check_parity.py", config, checkpoint, tmp_path / "hf", "--output", tmp_path / "parity.json")
    done = run_script(*command, "--mask", "compat", check=False)
    assert done.returncode == 2 and "set tokenize.mask: exact" in done.stderr
    run_script(*command, "--mask", "exact", "--template", template)
    gate = read_json(tmp_path / "parity.json")
    (reading,) = gate["ids"]
    assert reading["equal"] == reading["prompts"] == 4
    assert [each["reader"] for each in gate["unread"]] == ["transformers 4"]


def test_a_weight_that_the_conversion_changed_stops_it(chain, run_script, tmp_path):
    hf = shutil.copytree(chain / "hf", tmp_path / "hf")
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    done = check(chain, run_script, tmp_path / "parity.json", hf, check=False)
    assert done.returncode == 2 and "Hugging Face gives different logits than the checkpoint" in done.stderr
    assert not (tmp_path / "parity.json").exists()


def test_another_chat_template_stops_it(chain, run_script, tmp_path):
    """As if somebody edited the template for serving: the role line loses its line break."""
    hf = shutil.copytree(chain / "hf", tmp_path / "hf")
    template = hf / "chat_template.jinja"
    if template.is_file():
        template.write_text(template.read_text().replace("user\\n", "user "))
    else:
        config = read_json(hf / "tokenizer_config.json")
        changed = config["chat_template"].replace("user\\n", "user ")
        assert changed != config["chat_template"]
        write_json(hf / "tokenizer_config.json", {**config, "chat_template": changed})
    done = check(chain, run_script, tmp_path / "parity.json", hf, check=False)
    assert done.returncode == 2
    assert "transformers 5." in done.stderr and "differently than training" in done.stderr


def test_a_small_rope_difference_shows_in_the_logits(chain, run_script, tmp_path):
    hf = shutil.copytree(chain / "hf", tmp_path / "hf")
    config = read_json(hf / "config.json")
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10000.0
    write_json(hf / "config.json", config)
    done = check(chain, run_script, tmp_path / "parity.json", hf, check=False)
    assert done.returncode == 2 and "different logits" in done.stderr


def test_prompts_in_a_batch_do_not_see_each_other(chain):
    """Padding on the right must have no effect: each prompt alone has the same logits."""
    from transformers import AutoConfig

    from snaketune.checkpoints.safetensors_files import open_safetensors
    from snaketune.export.turbomind_folder import TurboMindFolder
    from snaketune.parity.reference_forward import transformers_logits, turbomind_logits

    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[1, 7:] = 0
    config, weights = AutoConfig.from_pretrained(chain / "hf"), open_safetensors(chain / "hf")
    folder = TurboMindFolder(chain / "turbomind")
    for logits in (lambda x: transformers_logits(config, weights, x), lambda x: turbomind_logits(folder, x)):
        torch.testing.assert_close(logits(ids)[1, :7], logits(ids[1:, :7])[0], rtol=1e-5, atol=1e-5)


def test_a_bos_that_begins_turns_is_known_to_be_taken_away(tiny_tokenizer_dir, tmp_path):
    """SmolLM2's BOS is `<|im_start|>`: training's ids start with two of them, lmdeploy's with one."""
    from snaketune.parity.id_parity import compare_ids, require_agreement

    tokenizer = extend_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    prompts, expected = [[{"role": "user", "content": "Hello"}]], [[5, 5, 9, 10]]

    def whys(form, ids):
        rows = compare_ids(prompts, expected, [{"reader": form, "form": form, "ids": [ids]}], tokenizer)
        return rows, [each["why"] for row in rows for each in row["differences"]]

    rows, (why,) = whys("silent", [5, 9, 10])
    assert "one of two equal BOS" in why and rows[0]["differences"][0]["at"] == 1
    require_agreement(rows)
    (why,) = whys("own system message", [5, 7, 8, 5, 9, 10])[1]
    assert "one of two equal BOS" in why and "meta_instruction" in why
    assert whys("silent", [5, 9, 11])[1] == whys("plain", [5, 9, 10])[1] == [None]
