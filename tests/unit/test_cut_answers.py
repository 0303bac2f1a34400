"""Conversations whose answers are cut off: counted, told, and harmless in training."""

from __future__ import annotations

import json
import math
import os

import pytest
from safetensors.torch import load_file

from snaketune.checkpoints.checkpoint_content import read_state_dict
from snaketune.common.files import read_json
from warm import PARENT

pytestmark = pytest.mark.slow

LIMIT, TALKS, STEPS = 64, 24, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer_dir, tiny_model_dir, write_processed, run_script):
    """A folder with the tokenised data, the pack plan and the finished training; the outputs of the first two."""
    folder = tmp_path_factory.mktemp("cut")
    talks = [
        [
            {"role": "user", "content": f"{number}: " + "Hello, how are you today? " * 40},
            {"role": "assistant", "content": "I am fine."},
        ]
        for number in range(TALKS)
    ]
    write_processed(folder / "in", {"long": talks})
    outputs = [
        run_script(
            *("tokenize_dataset.py", "--processed-dir", folder / "in", "--tokenized-dir", folder / "out"),
            *("--tokenizer-path", tiny_tokenizer_dir, "--max-length", LIMIT),
            *("--tokenizer-w-special-tokens-save-dir", folder / "tokenizer"),
        ).stdout,
        run_script(
            *("plan_packing.py", "--train-folder", folder / "out", "--max-length", 2 * LIMIT),
            *("--output", folder / "plan"),
        ).stdout,
    ]
    run_script(
        *("render_train_config.py", "--output", folder / "config.py", "--model-path", tiny_model_dir),
        *("--tokenizer-path", folder / "tokenizer", "--plan", folder / "plan", "--accumulative-counts", 2),
        *("--max-steps", STEPS, "--lr", 1e-2, "--weight-decay", 0, "--save-optimizer", "true"),
    )
    command = ["workflow_scripts/train_model.py", folder / "config.py", "--work-dir", folder / "run"]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = PARENT.run(command, timeout=300, env=own)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder, outputs


def test_the_outputs_name_the_folder_and_what_to_do(folder):
    folder, outputs = folder
    stats = read_json(folder / "out" / "manifests" / "long" / "stats.json")
    assert (stats["samples"], stats["truncated"], stats["truncated_untrained"]) == (TALKS, TALKS, TALKS)
    data = folder / "out" / "chatml_llamav13_32k" / "train" / "cn" / "long"
    for output in outputs:
        (warning,) = [line for line in output.splitlines() if line.startswith("warning: ")]
        assert str(data) in warning and f"{TALKS} of {TALKS}" in warning and "data.max_tokens" in warning


def test_steps_without_any_trained_token_have_loss_zero_and_move_no_weight(folder, tiny_model_dir):
    folder, _ = folder
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    for line in lines:
        assert (line["loss"], line["grad_norm"], line["trained_tokens"]) == (0, 0, 0)
        assert line["tokens"] == 4 * LIMIT and not line.get("skipped") and math.isfinite(line["lr"])
    base = load_file(tiny_model_dir / "model.safetensors")
    saved = read_state_dict(folder / "run" / f"iter_{STEPS}.pth")
    rows = {name.removeprefix("llm."): tensor for name, tensor in saved.items()}
    assert rows.keys() == base.keys()
    assert all(tensor.isfinite().all() for tensor in rows.values())
    assert all(rows[name][: len(tensor)].equal(tensor) for name, tensor in base.items())
