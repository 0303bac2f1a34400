"""Fixtures for all tests: a tiny tokenizer and model, ftdp folders, and running scripts as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from warm import PARENT, WarmParent

REPO = Path(__file__).resolve().parent.parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Hypothesis tries the same examples in every run; `--hypothesis-profile=explore` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore")
settings.load_profile("same")
# Several suites share the cores: threads of one process that wait for each other would make some tests ten
# times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_CORPUS = [
    "Hello, how are you today? I am fine, thank you.\n",
    "You are a helpful assistant who can call tools.\n\n",
    'print("hello world")\nfor i in range(10):\n    total = total + i\n',
    '{"name": "get_weather", "parameters": {"city": "Shanghai", "unit": "celsius"}}',
    "The weather in Shanghai is sunny, 25 degrees. What is 12 * 7? It is 84.",
    "你好，请给我介绍五个上海的景点。今天天气怎么样？",
]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout under test."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real conversations and a real tokenizer; skips the tests that need them if they are absent."""
    path = REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer: about 600 entries, BOS `<s>` and EOS `</s>`, saved as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer_dir) -> Path:
    """A random two-layer Llama (hidden 32, 4 heads, 2 KV heads, untied), with the tiny tokenizer."""
    import shutil

    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocabulary = Tokenizer.from_file(str(tiny_tokenizer_dir / "tokenizer.json")).get_vocab_size()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny_model")
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_tokenizer_dir / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def write_processed():
    """Writes `{dataset: [conversation, ...]}` to a folder in the processed layout and returns the folder."""

    def write(folder: Path, datasets: dict[str, list[list[dict]]]) -> Path:
        for name, conversations in datasets.items():
            file = Path(folder) / name / "processed" / "sft_chat" / f"{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in conversations]
            file.write_text("".join(lines), encoding="utf-8")
        return Path(folder)

    return write


@pytest.fixture(scope="session", autouse=True)
def _end_the_warm_parents():
    yield
    for parent in WarmParent.started:
        parent.close()


@pytest.fixture(scope="session")
def run_script():
    """Runs `workflow_scripts/<name>` as a user would and returns the finished process, with text output.

    The libraries are already imported (tests/warm.py), except with `warm=False`, which runs the plain
    command.
    """

    def run(
        name: str, *args: object, check: bool = True, timeout: float = 600, warm: bool = True, **kwargs
    ) -> subprocess.CompletedProcess:
        command = [str(REPO / "workflow_scripts" / name), *map(str, args)]
        if warm:
            done = PARENT.run(command, timeout, **kwargs)
        else:
            own = {"capture_output": True, "text": True, "timeout": timeout, **kwargs}
            done = subprocess.run([sys.executable, *command], **own)
        if check and done.returncode != 0:
            raise AssertionError(
                f"{name} exited {done.returncode}\n--- stdout\n{done.stdout[-4000:]}\n--- stderr\n{done.stderr[-4000:]}"
            )
        return done

    return run
