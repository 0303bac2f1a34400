"""The gate behind the conversions: does the converted model say what the trained one says, to the same prompts?

Three comparisons. The logits of the training checkpoint, of the Hugging Face folder and of the TurboMind files for the
same ids. The ids of the same prompts by training's tokenisation, by transformers 5 and 4, and by lmdeploy. And the proof
of the TurboMind folder (`turbomind_proof.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from snaketune.checkpoints.checkpoint_folders import read_state_dict
from snaketune.checkpoints.safetensors_files import open_safetensors
from snaketune.common.cli import UserError
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.prompt_ids import encode_prompt
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.export.hf_convert import training_dtype
from snaketune.export.lora_weights import grown_base
from snaketune.export.reference_forward import transformers_logits, turbomind_logits
from snaketune.export.turbomind_folder import TurboMindFolder
from snaketune.export.turbomind_proof import compare_logits
from snaketune.training.train_config import TrainConfig

# Forms of serving that may differ from training: when, and why.
_LMDEPLOY = ("own system message", "silent", "tool_calls")
_OWN_SYSTEM = (
    "lmdeploy puts a system message of its own before a conversation that has none; serve with meta_instruction: null, "
    "or send a system message"
)
_TOOL_CALLS = (
    "lmdeploy writes a call that comes back as OpenAI's tool_calls without the line break after <|action_end|>; send "
    "the assistant's text back as it was generated"
)
_ONE_BOS = (
    "this base's BOS is the token that begins a turn, so training's ids begin with two of it, and lmdeploy takes one of "
    "two equal BOS away"
)
_OPENAI_TOOLS = (
    "a server writes JSON anew, with its own spaces, and puts the list of tools behind the system messages; the data's "
    "differ in this prompt"
)


def compare_models(
    base: str,
    state: Mapping[str, torch.Tensor],
    hf: Path,
    turbomind: Path | None,
    prompts: list[list[int]],
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Compares the logits of the checkpoint, the Hugging Face folder and the TurboMind files.

    Each later one is compared with the one before, whose weights are rounded to the later one's dtype first: then
    nothing but the order of sums is left. How much the rounding itself changes is `rounding_difference`.

    Args:
        base: Base model, for the config that the checkpoint was trained with.
        state: The checkpoint's weights by name.
        hf: Hugging Face folder.
        turbomind: TurboMind workspace, or None.
        prompts: Token ids.
        trust_remote_code: Runs Python code that comes with the model.

    Returns:
        [{"of", "against", "dtype", "relative_difference", "largest_difference", "top1_agreement",
        "rounding_difference"}]

    Raises:
        UserError: Logits differ by more than fp32 arithmetic does.
    """
    from transformers import AutoConfig

    ids, real = _padded(prompts)

    def config(path: str | Path) -> Any:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)

    trained_config, hf_config = config(base), config(hf)
    embedding = state[_embedding(state)]
    trained_config.vocab_size = embedding.shape[0]
    weights = open_safetensors(hf)
    dtype = weights[next(iter(weights))].dtype
    exact = rounded = transformers_logits(trained_config, state, ids)[real]
    if embedding.dtype != dtype:
        rounded = transformers_logits(trained_config, state, ids, dtype)[real]
    ours = transformers_logits(hf_config, weights, ids)[real]
    # Rows of the vocabulary that no token has may be left out of the folder.
    rounded, exact = (logits[:, : ours.shape[-1]] for logits in (rounded, exact))
    rows = [_row("Hugging Face", "checkpoint", dtype, rounded, ours, exact)]
    if turbomind is not None:
        folder = TurboMindFolder(turbomind)
        rounded = ours
        if folder.dtype != dtype:
            rounded = transformers_logits(hf_config, weights, ids, folder.dtype)[real]
        theirs = turbomind_logits(folder, ids)[real]
        rows.append(_row("TurboMind", "Hugging Face", folder.dtype, rounded, theirs, ours))
    return rows


def trained_weights(
    config: TrainConfig, checkpoint: Path, record: dict[str, Any], trust_remote_code: bool = False
) -> Mapping[str, torch.Tensor]:
    """Returns all weights of a trained model. Those of a LoRA run are added up here, by hand and not by peft.

    Args:
        config: The training config.
        checkpoint: An `iter_N.pth`.
        record: The run's `train.json`, or {}.
        trust_remote_code: Runs Python code that comes with the model.
    """
    lora, state = config.lora, read_state_dict(checkpoint)
    if lora is None:
        return state
    dtype = training_dtype(config, record, checkpoint, state)
    model, new_ids = grown_base(config, dtype, trust_remote_code)
    weights = model.float().state_dict()
    for name, value in state.items():
        module, _, rest = name.partition(".lora_A.")
        if rest:
            weights[f"{module}.weight"] += (
                lora["alpha"] / lora["rank"] * state[f"{module}.lora_B.{rest}"] @ value
            )
        elif ".token_adapter." in name:
            weights[name.replace(".token_adapter.trainable_tokens_delta.default", ".weight")][new_ids] = value
    return weights


def compare_ids(
    prompts: list[list[dict]],
    expected: list[list[int]],
    readings: list[dict[str, Any]],
    tokenizer: ExtendedTokenizer,
) -> list[dict[str, Any]]:
    """Compares the ids of prompts by training's tokenisation with those of other readers.

    Args:
        prompts: Conversations without the answer.
        expected: Their ids in training, from `training_ids`.
        readings: What `prompt_readers` returned.
        tokenizer: The extended tokenizer, which spells what differs.

    Returns:
        [{"reader", "prompts", "equal", "differences": [{"prompt", "at", "training", "reader", "why"}]}]; `at` is the
        first token that differs, and the two texts begin there.
    """
    decode = tokenizer.tokenizer.decode
    rows = []
    for reading in readings:
        differences = []
        for number, (wanted, found) in enumerate(zip(expected, reading["ids"], strict=True), 1):
            if wanted == found:
                continue
            at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), 0)
            at = at or min(len(wanted), len(found)) * (wanted[:1] == found[:1])
            pieces = [decode(ids[at : at + 24], skip_special_tokens=False) for ids in (wanted, found)]
            reasons = []
            if reading["form"] in _LMDEPLOY and wanted[0] == wanted[1] and found[:2] != wanted[:2]:
                reasons, wanted = [_ONE_BOS], wanted[1:]
            if wanted != found:
                reasons.append(_explanation(reading["form"], prompts[number - 1]))
            differences.append(
                {
                    "prompt": number,
                    "at": at,
                    **dict(zip(("training", "reader"), pieces, strict=True)),
                    "why": None if None in reasons else "; ".join(reasons),
                }
            )
        rows.append(
            {
                "reader": reading["reader"],
                "prompts": len(expected),
                "equal": len(expected) - len(differences),
                "differences": differences,
            }
        )
    return rows


def training_ids(
    prompts: list[list[dict]], tokenizer: ExtendedTokenizer, encoding: ChatEncoding
) -> list[list[int]]:
    """Returns the ids of each prompt and of the assistant's beginning turn, as training, with this encoding, would see them."""
    return [
        encode_prompt(prompt, tokenizer, encoding, f"prompt {number}", max_length=None)
        for number, prompt in enumerate(prompts, 1)
    ]


def require_agreement(rows: list[dict[str, Any]]) -> None:
    """Raises a UserError when a reader differs from training without a known reason."""
    for row in rows:
        for each in row["differences"]:
            if each["why"] is None:
                raise UserError(
                    f"{row['reader']} reads a prompt otherwise than training did",
                    found=f"prompt {each['prompt']}, token {each['at']}: {each['reader']!r}",
                    expected=repr(each["training"]),
                    fix="do not serve this model with that reader; check its chat template against the training's",
                )


def _explanation(form: str, prompt: list[dict]) -> str | None:
    if form == "own system message" and prompt[0]["role"] != "system":
        return _OWN_SYSTEM
    if form == "openai" and any(message.get("name") == "plugin" for message in prompt):
        return _OPENAI_TOOLS
    if form == "tool_calls" and any(message["role"] == "tool" for message in prompt):
        return _TOOL_CALLS
    return None


def _row(
    of: str,
    against: str,
    dtype: torch.dtype,
    expected: torch.Tensor,
    found: torch.Tensor,
    unrounded: torch.Tensor,
) -> dict[str, Any]:
    differences = compare_logits(expected, found, of, f"the {against}")
    rounding = ((expected - unrounded).norm() / unrounded.norm()).item()
    name = str(dtype).removeprefix("torch.")
    return {"of": of, "against": against, "dtype": name, **differences, "rounding_difference": rounding}


def _padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids (prompts, longest), padded on the right with 0, and where they are real."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    real = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        real[row, : len(prompt)] = True
    return ids, real


def _embedding(state: Mapping[str, torch.Tensor]) -> str:
    return next(name for name in state if name.endswith("embed_tokens.weight"))
