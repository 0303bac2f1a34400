"""Evaluation during training does not affect it; and LoRA, from training to the converted model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from snaketune.common.cli import UserError
from snaketune.training.metrics_hook import MEASURED
from warm import PARENT

pytestmark = pytest.mark.slow

STEPS = 5
RANK, ALPHA = 4, 12.0
WORDS = ["the", "weather", "in", "Shanghai", "is", "sunny", "today", "and", "I", "am", "fine", "thank", "you"]
HOOKS = ("--eval-steps", 2, "--generate-steps", 3, "--eval-max-samples", 5)
LORA = ("--lora-rank", RANK, "--lora-alpha", ALPHA, "--lora-dropout", 0.1, "--zero-stage", 2)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model_dir, tiny_tokenizer_dir, run_script, write_processed):
    """A folder with an extended tokenizer, tokenised and held-out conversations, and prompts."""
    folder = tmp_path_factory.mktemp("watch")
    talks = [
        [
            {"role": "user", "content": " ".join(WORDS[: 1 + i % 9])},
            {"role": "assistant", "content": WORDS[i % 7] * 3},
        ]
        for i in range(60)
    ]
    write_processed(folder / "processed", {"talks": talks[:50]})
    write_processed(folder / "heldout", {"talks": talks[50:], "more": talks[40:43]})
    (folder / "prompts.json").write_text(json.dumps([talks[0][:1], talks[5][:1]]))
    run_script(
        *("tokenize_dataset.py", "--processed-dir", folder / "processed", "--tokenized-dir", folder / "data"),
        *(
            "--tokenizer-path",
            tiny_tokenizer_dir,
            "--tokenizer-w-special-tokens-save-dir",
            folder / "tokenizer",
        ),
    )
    return folder


@pytest.fixture(scope="module")
def train(world, tiny_model_dir, run_script, repo_root):
    """Trains on two ranks. Returns (finished process, run folder)."""

    def start(name: str, *flags: object, code: int = 0, processes: int = 2, **environment: str):
        config = world / f"{name}.py"
        run_script(
            *("render_train_config.py", "--output", config, "--model-path", tiny_model_dir),
            *(
                "--tokenizer-path",
                world / "tokenizer",
                "--train-folder",
                world / "data/chatml_llamav13_32k/train",
            ),
            *("--max-length", 64, "--max-steps", STEPS, "--lr", 1e-2, "--save-steps", 3, "--heldout-dir"),
            *(world / "heldout", "--prompts", world / "prompts.json", "--max-new-tokens", 6, *flags),
        )
        text = config.read_text().replace(
            "custom_hooks = []", "custom_hooks = [dict(type=DumpWeights), dict(type=KillRank)]"
        )
        config.write_text(
            text.replace(
                "from torch.optim", "from train_hooks import DumpWeights, KillRank\nfrom torch.optim"
            )
        )
        own = {"PYTHONPATH": str(repo_root / "tests"), "OMP_NUM_THREADS": "1", **environment}
        command = [repo_root / "workflow_scripts/train_model.py", config, "--work-dir", world / name]
        done = PARENT.run([*command, "--processes", processes], timeout=300, env={**os.environ, **own})
        assert (done.returncode == 0) == (code == 0), done.stdout[-3000:] + done.stderr[-5000:]
        return done, world / name

    return start


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def computed(folder: Path) -> list[dict]:
    """Returns the metrics without fields that differ between equal runs."""
    lines = lines_of(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


@pytest.fixture(scope="module")
def watched_lora(world, train):
    """A LoRA run with dropout and evaluation, killed after its checkpoint and resumed; weights in lora.pt."""
    train("lora", *LORA, *HOOKS, code=1, TEST_KILL="5:1")
    assert [line["step"] for line in lines_of(world / "lora/evals.jsonl")] == [0, 2, 4]
    with open(world / "lora/evals.jsonl", "a") as file:
        file.write('{"step": 5, "los')
    return train("lora", *LORA, *HOOKS, TEST_DUMP=str(world / "lora.pt"))


@pytest.fixture(scope="module")
def plain_lora(train):
    """The run folder of the same run without evaluation or a kill."""
    return train("plain", *LORA)[1]


def test_watching_and_a_kill_change_nothing(watched_lora, plain_lora):
    """Dropout draws random numbers at every step: one extra draw would change all later losses."""
    _, folder = watched_lora
    assert computed(folder) == computed(plain_lora)
    assert [line["attempt"] for line in lines_of(folder / "metrics.jsonl")] == [1, 1, 1, 2, 2]
    assert not (plain_lora / "evals.jsonl").exists() and not (plain_lora / "generations.jsonl").exists()


def test_what_is_written(world, watched_lora):
    done, folder = watched_lora
    evals = lines_of(folder / "evals.jsonl")
    assert [line["step"] for line in evals] == [0, 2, 4, 5]
    assert evals[-1]["loss"] < evals[0]["loss"] and evals[-1]["samples"] == 8
    assert set(evals[0]["datasets"]) == {"more", "talks"}
    answers = lines_of(folder / "generations.jsonl")
    assert [line["step"] for line in answers] == [0, 3, 5]
    assert all(len(line["answers"]) == 2 and line["answers"][0]["tokens"] <= 6 for line in answers)
    assert "Held-out loss after step 5: " in done.stdout and "Answer 2 after step 5" in done.stdout
    line = lines_of(folder / "metrics.jsonl")[-1]
    assert line["mfu"] is None and line["tflops_per_device"] > 0
    assert 0 <= line["data_share"] < 1 and line["cpu_memory_mib"] > 50 and line["eta_seconds"] == 0
    assert line["trained_share"] == pytest.approx(line["trained_tokens"] / line["tokens"], abs=1e-5)
    assert line["tokens_per_second_per_device"] == pytest.approx(line["tokens_per_second"] / 2, rel=0.01)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("heldout/loss")] == [0, 2, 4, 5]
    assert board.Scalars("heldout/loss")[-1].value == pytest.approx(evals[-1]["loss"])
    assert "train/tokens_per_second_per_device" in board.Tags()["scalars"]


def test_checkpoint_of_lora_is_small_and_its_model_is_the_one_in_memory(
    world, watched_lora, tiny_model_dir, run_script, repo_root
):
    from snaketune.checkpoints.checkpoint_content import read_state_dict
    from snaketune.encoding.chat_encoding import ChatEncoding
    from snaketune.encoding.tokenizer import load_tokenizer
    from snaketune.evaluation.heldout import load_heldout
    from snaketune.evaluation.models import load_for_evaluation
    from snaketune.evaluation.scoring import score

    _, folder = watched_lora
    in_memory = torch.load(world / "lora.pt", weights_only=True)
    trained = {name for name in in_memory if "lora_" in name or "_delta" in name}
    assert set(read_state_dict(folder / "iter_5.pth")) == trained
    model_file = folder / "iter_5.pth/mp_rank_00_model_states.pt"
    assert model_file.stat().st_size < sum(p.numel() * 4 for p in in_memory.values()) / 2
    run_script(
        *(
            "convert_pth_to_hf.py",
            world / "lora.py",
            folder / "iter_5.pth",
            world / "hf",
            "--lora",
            "adapter",
        ),
        env={**os.environ, "PYTHONPATH": str(repo_root / "tests")},
    )
    written = load_file(world / "hf/model.safetensors")
    assert len(written) == len(load_file(tiny_model_dir / "model.safetensors"))
    # Computed here: W + alpha / rank B A, and the rows of new tokens in the embedding and the head.
    for name, weight in written.items():
        module = name.removesuffix(".weight")
        expected = in_memory.get(f"{module}.base_layer.weight", in_memory.get(name))
        a = in_memory.get(f"{module}.lora_A.default.weight")
        if a is not None:
            expected = expected + ALPHA / RANK * in_memory[f"{module}.lora_B.default.weight"] @ a
        rows = in_memory.get(f"{module}.token_adapter.trainable_tokens_delta.default")
        if rows is not None:
            expected = in_memory[f"{module}.token_adapter.base_layer.weight"].clone()
            ids = sorted(json.loads((world / "tokenizer/manifest.json").read_text())["added"].values())
            assert len(ids) == len(rows) == 6 and not torch.equal(expected[ids], rows)
            expected[ids] = rows
        expected = expected[: len(weight)]  # rows without a token are not written
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0, msg=name)
    assert {p.name for p in (world / "hf/adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    tokenizer = load_tokenizer(world / "tokenizer")
    merged = load_for_evaluation(str(world / "hf"), str(world / "tokenizer"), tokenizer)
    samples = load_heldout(world / "heldout", tokenizer, ChatEncoding(), 4096, 5)
    loss = score(merged, samples, tokenizer.vocab_size)["loss"]
    assert loss == pytest.approx(lines_of(folder / "evals.jsonl")[-1]["loss"], abs=1e-5)


def test_a_model_in_shards_watched_killed_and_resumed(train, plain_lora):
    """In ZeRO-3 all ranks gather weights in every forward pass; the results must equal those of ZeRO-2."""
    from snaketune.checkpoints.checkpoint_content import read_state_dict

    flags = (*LORA, *HOOKS, "--zero-stage", 3)
    train("lora3", *flags, code=1, TEST_KILL="5:1")
    _, folder = train("lora3", *flags)
    found, expected = lines_of(folder / "metrics.jsonl"), lines_of(plain_lora / "metrics.jsonl")
    assert [line["attempt"] for line in found] == [1, 1, 1, 2, 2]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-6)
    state, whole = (read_state_dict(path / "iter_5.pth") for path in (folder, plain_lora))
    assert state.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(state[name], weight, atol=1e-4, rtol=0, msg=name)
    evals = lines_of(folder / "evals.jsonl")
    assert [line["step"] for line in evals] == [0, 2, 4, 5] and evals[-1]["loss"] < evals[0]["loss"]
    assert [line["step"] for line in lines_of(folder / "generations.jsonl")] == [0, 3, 5]


def test_a_tracker_that_is_not_installed_is_named():
    import importlib.util

    from snaketune.training.trackers import check_loggers

    absent = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name) is None]
    if not absent:
        pytest.skip("wandb and mlflow are both installed")
    with pytest.raises(UserError, match=rf"(?s){absent[0]}, which is not installed.*pip install {absent[0]}"):
        check_loggers(absent)
