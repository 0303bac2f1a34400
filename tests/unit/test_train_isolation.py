"""A model whose documents would see each other: refused before its first step, and trained with one document a row."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from snaketune.packing.pack_plan import open_plan
from snaketune.packing.packed_sequences import PackedSequences
from tiny_run import VOCABULARY, _script, make_world, metrics, render, train

pytestmark = pytest.mark.slow
ROWS = 4  # of a step


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Random models, one with short convolutions and one whose attention makes a mask of its own, data and a plan."""
    from transformers import DogeConfig, DogeForCausalLM, Lfm2Config, Lfm2ForCausalLM

    folder = make_world(tmp_path_factory.mktemp("isolation"), documents=40)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "full_attn_idxs": [1]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Lfm2Config(
        vocab_size=VOCABULARY, **sizes, **heads, tie_word_embeddings=False, initializer_range=0.3
    )
    Lfm2ForCausalLM(config).save_pretrained(folder / "model")
    sizes.pop("full_attn_idxs")
    config = DogeConfig(vocab_size=VOCABULARY, **sizes, **heads, keep_window_size=16, initializer_range=0.3)
    DogeForCausalLM(config).save_pretrained(folder / "doge")
    return folder


def settings(*flags: object) -> tuple:
    return ("--max-steps", 2, "--accumulative-counts", ROWS, "--save-steps", 2, *flags)


def test_it_is_refused_before_the_first_step(world):
    config = render(world, "packed.py", *settings(), replace={str(world / "model"): str(world / "doge")})
    output = train(config, world / "packed", code=2, processes=1)
    assert "error: documents of a packed sequence see each other in doge" in output
    assert "to fix:   set packing.mode: single" in output and "Traceback" not in output
    assert metrics(world / "packed") == []


def test_one_document_a_row_trains_as_plain_transformers(world):
    from transformers import AutoModelForCausalLM

    data = ("--train-folder", world / "data" / "chatml_llamav13_32k" / "train")
    data += ("--data-order", world / "data_order.txt", "--max-length", 64)
    _script("plan_packing.py", *data, "--mode", "single", "--output", world / "single_plan")
    plan = open_plan(world / "single_plan")
    rows = PackedSequences(plan)
    assert max(len(rows[number]["cumulative_len"]) for number in range(len(rows))) == 2
    config = render(
        world, "single.py", *settings(), replace={str(world / "plan"): str(world / "single_plan")}
    )
    train(config, world / "single", processes=1)
    model = AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="eager")
    total, count = 0.0, 0
    for number in plan.order(0)[:ROWS]:
        row = {name: torch.from_numpy(rows[number][name]) for name in ("input_ids", "labels")}
        with torch.no_grad():
            logits = model(row["input_ids"][None]).logits[0, :-1]
        targets = row["labels"][1:]
        total += cross_entropy(logits, targets, reduction="sum", ignore_index=-100).item()
        count += int((targets != -100).sum())
    assert metrics(world / "single")[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics(world / "single")[0]["trained_tokens"] == count
