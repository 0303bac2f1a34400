"""A LoRA run through the whole workflow: the evaluated and served model is the trained one."""

from __future__ import annotations

import json

import pytest

from kept import kept


def test_what_lora_trained_is_what_is_evaluated_and_served(finished):
    train = {"lora": {"rank": 2}, "zero_stage": 3, "eval_steps": 6, "generate_steps": 6}
    with kept(finished.config_file):
        finished.configure(runs={"demo": {}, "lora": {"train": train, "hf": {"lora": "adapter"}}})
        finished.run("results/lora/evaluation/tuned.json")
    run = finished.folder / "results" / "lora"

    def read(name):
        return [json.loads(line) for line in (run / name).read_text().splitlines()]

    folder = json.loads((run / "train.json").read_text())["run_folder"]
    before, after = read(f"{folder}/evals.jsonl")
    assert (before["step"], after["step"]) == (0, 6) and after["loss"] < before["loss"]
    tuned = json.loads((run / "evaluation/tuned.json").read_text())
    assert tuned["loss"] == pytest.approx(after["loss"], abs=1e-5)
    answers = read(f"{folder}/generations.jsonl")[-1]["answers"]
    assert [answer["text"] for answer in answers] == [answer["text"] for answer in tuned["generations"]]
    parity = json.loads((run / "parity.json").read_text())
    assert all(row["top1_agreement"] == 1.0 for row in parity["logits"])
    assert (run / "hf/adapter/adapter_model.safetensors").is_file()
