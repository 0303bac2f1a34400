"""Writes the model card: what a tuned model was made from (with digests), its evaluation, and how to serve it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snaketune.common.files import sha256_json
from snaketune.export.turbomind_limits import base_config
from snaketune.serving.commands import lmdeploy_command, sglang_command, vllm_command
from snaketune.serving.lmdeploy_engines import session_length
from snaketune.tokenized.layout import manifests_folder
from snaketune.tokenized.manifests import list_manifests, read_manifest

_DATASETS = 40  # rows of the dataset table
# Settings about how training works rather than its numbers.
_LEFT_OUT = (".type", "train_dataloader.", "randomness.deterministic", "by_epoch")


def tokenized_folder(plan: str | None, train_folder: str | None) -> Path | None:
    """Returns the folder with the manifests of a training's data, None if they are not found.

    Args:
        plan: Folder of the pack plan (`<tokenized>/packs/<plan>`), or None.
        train_folder: Folder of the tokenised files (`<tokenized>/<format>/train`), or None.
    """
    path = Path(plan or train_folder or "nowhere")
    folder = path.parent.parent
    return folder if manifests_folder(folder).is_dir() else None


def model_card(
    base: str,
    hf: Mapping[str, Any],
    record: Mapping[str, Any],
    identity: Mapping[str, Any],
    tokenized: Path | None,
    folder: str = ".",
    evaluations: Sequence[Mapping[str, Any]] = (),
    parity: Mapping[str, Any] | None = None,
) -> str:
    """Returns the card as Markdown.

    Args:
        base: Base model, folder or hub name; the card shows only a folder's name.
        hf: Manifest of the Hugging Face folder.
        record: train.json; empty while training is running.
        identity: The fields of the run's identity.json, or empty.
        tokenized: See `tokenized_folder`.
        folder: The model's folder in the commands.
        evaluations: Results of evaluate_model.py for the base and the tuned model.
        parity: parity.json.
    """
    name = Path(base).name if Path(base).exists() else base
    template = (hf.get("chat_template") or {}).get("name", "internlm2_chat")
    lines = [
        "---",
        f"base_model: {json.dumps(name)}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
    ]
    lines += ["", f"# {name}, fine-tuned", ""]
    lines += [
        f"A {hf['architecture']} with {hf['parameters']:,} parameters in {hf['dtype']}, {hf['vocab_size']:,} "
        f"vocabulary rows and the chat template `{template}`. SnakeTune made it from `{hf['checkpoint']}`.",
        "",
        "| | SHA-256 |",
        "| --- | --- |",
        *_row("base model", identity.get("base_model")),
        *_row("tokenizer.json", hf["tokenizer_sha256"]),
        *_row("trained weights", record.get("weights_sha256")),
        *_row("pack plan", record.get("plan_sha256")),
        *_row("weights in this folder", hf["weights_sha256"]),
        "",
        "## Data",
        "",
        *_data(tokenized),
        "",
        "## Training",
        "",
    ]
    if record:
        lines += [
            f"Steps: {record['steps']:,} of {record['global_batch']} packed sequence(s) each; epochs: "
            f"{record['epochs']:.3g}; tokens: {record['tokens']:,}; ZeRO-{record['zero_stage']} on "
            f"{record['world_size']} rank(s); last loss: {record['final_loss']:.4f}.",
            "",
        ]
    shown = {
        key: value
        for key, value in sorted(identity.get("hyperparameters", {}).items())
        if not any(part in key for part in _LEFT_OUT)
    }
    lines += [
        "| Setting | Value |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in shown.items()),
    ]
    if evaluations:
        lines += ["", "## Evaluation", "", "On held-out conversations, which were never trained on.", ""]
        lines += ["| Model | Loss | Perplexity | Trained tokens |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {each['label']} | {each['loss']:.4f} | {each['perplexity']:.2f} | {each['trained_tokens']:,} |"
            for each in evaluations
        ]
    if parity is not None:
        lines += ["", "## Conversions", "", *parity_table(parity)]
    source = {"path": base, "hub": None} if Path(base).exists() else {"path": None, "hub": base}
    length = session_length(base_config(source) or {}, None)
    commands = [
        lmdeploy_command(Path(folder), "tuned", hf["architecture"], session_len=length, template=template),
        vllm_command(Path(folder), "tuned", template=template),
        sglang_command(Path(folder), "tuned"),
    ]
    lines += ["", "## Serving", "", "```", *commands, "```", ""]
    lines += ["Generation stops at the ids in `generation_config.json`, which include the end of a turn.", ""]
    return "\n".join(lines)


def parity_table(parity: Mapping[str, Any]) -> list[str]:
    """Returns the logits and token ids of the parity check as two Markdown tables."""
    lines = [
        "| Logits of | Against | In | Relative difference | Top-1 agreement |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['of']} | {row['against']} | {row['dtype']} | {row['relative_difference']:.1e} | "
        f"{row['top1_agreement']:.1%} |"
        for row in parity["logits"]
    ]
    lines += [f"\nLogits of {each['reader']}: {each['why']}" for each in parity["unread"]]
    lines += ["", "| Token ids by | Equal prompts | Reason for differences |", "| --- | --- | --- |"]
    for row in parity["ids"]:
        why = "; ".join(dict.fromkeys(each["why"] or "unknown" for each in row["differences"]))
        lines.append(f"| {row['reader']} | {row['equal']} of {row['prompts']} | {why} |")
    return lines


def _row(name: str, digest: str | None) -> list[str]:
    return [f"| {name} | `{digest}` |"] if digest else []


def _data(tokenized: Path | None) -> list[str]:
    manifests = [read_manifest(path) for path in list_manifests(tokenized)] if tokenized else []
    if not manifests:
        return ["No manifests of the data were found."]
    lines = ["| Dataset | Conversations | Tokens | SHA-256 of its manifest |", "| --- | --- | --- | --- |"]
    for each in manifests[:_DATASETS]:
        samples, tokens = (sum(file[key] for file in each["files"]) for key in ("samples", "tokens"))
        lines.append(f"| {each['dataset']} | {samples:,} | {tokens:,} | `{sha256_json(each)}` |")
    if len(manifests) > _DATASETS:
        lines.append(f"| and {len(manifests) - _DATASETS} more | | | |")
    return lines
