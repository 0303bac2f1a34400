"""Training against a plain PyTorch loop: every ZeRO stage, one and two ranks, the same global batch.

The reference runs one document at a time with eager attention and full logits. It uses no packing,
per-document attention, chunked loss, accumulation or ranks, so any effect of these would show.
"""

from __future__ import annotations

import functools
import json
import math
import os

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import parity_ranks as parity
from snaketune.checkpoints.checkpoint_content import read_state_dict
from warm import PARENT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, repo_root):
    """A folder with the finished runs of all cases."""
    folder = tmp_path_factory.mktemp("parity")
    parity.prepare(folder)
    tests = repo_root / "tests"
    paths = os.pathsep.join(map(str, [repo_root / "workflow_scripts", tests]))
    own = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for ranks in (1, 2):
        done = PARENT.run([tests / "ranks.py", ranks, tests / "parity_ranks.py", folder], 300, env=own)
        assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    """Returns a function: (model, normalisation) -> (losses and router's losses by step, final weights by name)."""

    @functools.cache
    def train(model_name: str, normalisation: str):
        model = AutoModelForCausalLM.from_pretrained(
            folder / model_name, dtype=torch.float32, attn_implementation="eager", trust_remote_code=True
        )
        rows = parity.Rows().rows
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=parity.LR, betas=parity.BETAS, weight_decay=parity.DECAY
        )
        coefficient = getattr(model.config, "router_aux_loss_coef", 0.0)
        losses, aux_losses = [], []
        for step in range(parity.STEPS):
            first = step * parity.GLOBAL_BATCH
            batch = [rows[entry % len(rows)] for entry in range(first, first + parity.GLOBAL_BATCH)]
            sums, router = zip(*[row_loss(model, row) for row in batch], strict=True)
            tokens = [len(row["labels"]) for row in batch]
            counts = [int((row["labels"][1:] != -100).sum()) for row in batch]
            if normalisation == "token":
                loss = sum(sums) / sum(counts)
                aux_loss = sum(n * each for n, each in zip(tokens, router, strict=True)) / sum(tokens)
            else:
                means = [total / count for total, count in zip(sums, counts, strict=True) if count]
                loss, aux_loss = sum(means) / len(batch), sum(router) / len(batch)
            (loss + coefficient * aux_loss).backward()
            losses.append(loss.item())
            aux_losses.append(float(torch.as_tensor(aux_loss).detach()))
            for parameter in model.parameters():  # an expert without tokens
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
            for parameter in model.parameters():
                parameter.grad *= min(1.0, parity.CLIP / (norm + 1e-6))
            optimizer.param_groups[0]["lr"] = parity.lr_of(step)
            optimizer.step()
            optimizer.zero_grad()
        weights = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
        return losses, aux_losses, weights

    return train


def row_loss(model, row: dict) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Returns the summed token losses of a row and the loss of its router, one document at a time.

    Labels shift over the whole row.
    """
    boundaries = row["cumulative_len"]
    answers = [
        model(torch.from_numpy(row["input_ids"][start:stop])[None], use_cache=False)
        for start, stop in zip(boundaries[:-1], boundaries[1:], strict=True)
    ]
    logits = torch.cat([answer.logits[0] for answer in answers])
    targets = torch.from_numpy(row["labels"])[1:]
    loss = cross_entropy(logits[:-1], targets, ignore_index=-100, reduction="sum")
    if "router_logits" not in answers[0]:
        return loss, 0.0
    layers = zip(*[answer.router_logits for answer in answers], strict=True)
    layers = tuple(torch.cat(parts) for parts in layers)
    return loss, load_balancing_loss_func(layers, model.num_experts, model.num_experts_per_tok)


def relative_l2(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return math.sqrt(difference / sum(float(b[name].double().square().sum()) for name in b))


IN_FP32 = [case for case, (*_, changes) in parity.CASES.items() if not changes.keys() & {"dtype", "lora"}]
IN_BFLOAT16 = [case for case, (*_, changes) in parity.CASES.items() if "dtype" in changes]


@pytest.mark.parametrize("case", IN_FP32)
def test_the_steps_equal_a_plain_loop(case, folder, reference):
    _, model, _, changes = parity.CASES[case]
    losses, aux_losses, weights = reference(model, changes.get("loss_normalisation", "token"))
    lines = [json.loads(line) for line in (folder / case / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == parity.STEPS and losses[-1] < losses[0]
    assert all(line["grad_norm"] > 0 for line in lines)
    np.testing.assert_allclose([line["loss"] for line in lines], losses, atol=1e-5, rtol=0)
    np.testing.assert_allclose([line.get("aux_loss", 0.0) for line in lines], aux_losses, atol=1e-5, rtol=0)
    in_memory = torch.load(folder / case / "weights.pt", weights_only=True)
    assert relative_l2(in_memory, weights) < (1e-5 if model in parity.RECURRENT else 2e-6)
    saved = read_state_dict(folder / case / f"iter_{parity.STEPS}.pth")
    assert saved.keys() == in_memory.keys()
    assert all(torch.equal(saved[name], in_memory[name]) for name in saved)


@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_bfloat16_follows_the_same_path(case, folder, reference):
    """bfloat16, the default on GPUs, has three digits. The checkpoint has the fp32 weights."""
    losses, _, weights = reference("llama", "token")
    lines = [json.loads(line) for line in (folder / case / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in lines], losses, atol=2e-2, rtol=0)
    in_memory = torch.load(folder / case / "weights.pt", weights_only=True)
    saved = read_state_dict(folder / case / f"iter_{parity.STEPS}.pth")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert relative_l2(saved, weights) < 2e-2
    assert all(torch.equal(saved[name].bfloat16(), in_memory[name]) for name in in_memory)


def test_lora_in_layers_that_run_document_by_document(folder):
    """Two ranks in ZeRO-3, where the first layer's input has no gradient, equal one rank that holds all weights."""
    one, two = (folder / case for case in ("lora, zero1, 1 rank", "lora, zero3, 2 ranks"))
    losses = [
        [json.loads(line)["loss"] for line in (case / "metrics.jsonl").read_text().splitlines()]
        for case in (one, two)
    ]
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(*losses, atol=1e-5, rtol=0)
    weights = [torch.load(case / "weights.pt", weights_only=True) for case in (one, two)]
    assert any("conv.in_proj" in name and "lora_B" in name for name in weights[0])
    assert relative_l2(*weights) < 1e-5


def test_the_two_normalisations_differ(reference):
    """Otherwise, the cases above would prove nothing about normalisation."""
    token, micro_batch = (reference("llama", normalisation)[0] for normalisation in ("token", "micro_batch"))
    assert abs(token[0] - micro_batch[0]) > 1e-2
