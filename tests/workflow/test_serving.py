"""`snakemake serve` on a finished run: the model card and the commands match the run's files."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from snaketune.common.files import sha256_file, sha256_json


@pytest.fixture(scope="module")
def served(finished):
    """(folder of the run, model card, serve.txt). Removes the files of `snakemake serve` afterwards."""
    run = finished.folder / "results" / "demo"
    before = set(finished.folder.rglob("*"))
    done = finished.run("serve")
    card, commands = (run / name for name in ("model_card.md", "serve.txt"))
    assert commands.read_text() in done.stdout + done.stderr
    yield run, card.read_text(), commands.read_text()
    for path in set(finished.folder.rglob("*")) - before:
        if path.is_file() and ".snakemake" not in path.parts:
            path.unlink()


def read(path):
    return json.loads(path.read_text())


def test_the_card_names_base_data_and_weights_by_their_hashes(served, finished):
    run, card, _ = served
    train, hf = read(run / "train.json"), read(run / "hf" / "manifest.json")
    identity = read(run / train["run_folder"] / "identity.json")["fields"]
    for digest in (
        identity["base_model"],
        sha256_file(run / "hf" / "tokenizer.json"),
        train["weights_sha256"],
        train["plan_sha256"],
        hf["weights_sha256"],
    ):
        assert f"`{digest}`" in card
    manifests = sorted(finished.folder.glob("results/shared/data/*/manifests/*.json"))
    assert [path.stem for path in manifests] == ["plain_chat", "tool_calls"]
    for manifest in map(read, manifests):
        samples = sum(file["samples"] for file in manifest["files"])
        assert f"| {manifest['dataset']} | {samples:,} | " in card and f"`{sha256_json(manifest)}`" in card
    assert f"| optim_wrapper.optimizer.lr | {finished.config['train']['lr']:g} |" in card
    assert "| train_cfg.max_steps | 6 |" in card and f"ZeRO-{train['zero_stage']}" in card


def test_the_card_has_the_figures_of_the_evaluation_and_of_the_gate(served):
    run, card, _ = served
    for label in ("base", "tuned"):
        row = read(run / "evaluation" / f"{label}.json")
        figures = f"{row['loss']:.4f} | {row['perplexity']:.2f} | {row['trained_tokens']:,}"
        assert f"| {label} | {figures} |" in card
        assert figures not in (run / "hf" / "README.md").read_text()
    parity = read(run / "parity.json")
    assert len(parity["logits"]) == 3 and len(parity["ids"]) == 6
    for row in parity["logits"]:
        assert (
            f"| {row['of']} | {row['against']} | {row['dtype']} | {row['relative_difference']:.1e} |" in card
        )
    for row in parity["ids"]:
        assert f"| {row['reader']} | {row['equal']} of {row['prompts']} |" in card


def test_the_hub_can_read_the_front_matter(served):
    from huggingface_hub import ModelCard

    run, card, _ = served
    for text in (card, (run / "hf" / "README.md").read_text()):
        _, front, body = text.split("---\n", 2)
        expected = {"library_name": "transformers", "pipeline_tag": "text-generation"}
        assert yaml.safe_load(front) == {"base_model": "tiny-mistral"} | expected
        assert ModelCard(text).data.to_dict() == yaml.safe_load(front)
        assert body.lstrip().startswith("# tiny-mistral, fine-tuned")


def test_the_commands_name_what_is_there_and_where_an_answer_ends(served, finished):
    run, card, commands = served
    ends = re.findall(r"(\S+) \((\d+)\)", commands.splitlines()[0])
    assert [int(number) for _, number in ends] == read(run / "hf/generation_config.json")["eos_token_id"]
    vocabulary = {token["content"]: token["id"] for token in read(run / "hf/tokenizer.json")["added_tokens"]}
    assert ends[0] == ("<|im_end|>", str(vocabulary["<|im_end|>"]))
    lines = [line for line in commands.splitlines() if line and not line.startswith("#")]
    converted, newer, vllm, sglang, terminal = lines
    assert converted.startswith("lmdeploy serve api_server results/demo/turbomind ")
    assert f"--session-len {read(run / 'hf/config.json')['max_position_embeddings']} " in converted
    assert newer.startswith("lmdeploy serve api_server results/demo/hf ")
    assert vllm.startswith("vllm serve results/demo/hf ") and "--enable-auto-tool-choice" in vllm
    assert all("--tool-call-parser internlm" in line for line in (converted, newer, vllm))
    assert "sglang.launch_server" in sglang and "--tool-call-parser" not in sglang
    assert terminal == "python workflow_scripts/chat.py results/demo/hf"
    named = re.findall(r"results/\S+", "\n".join(lines))
    assert len(named) == 6 and all((finished.folder / path).exists() for path in named)
    template = read(run / "lmdeploy_chat_template.json")
    assert template == {"model_name": "internlm2", "meta_instruction": None}
    assert "vllm serve results/demo/hf " in card
