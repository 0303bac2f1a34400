"""The parity check after conversion: the converted model must agree with the trained one.

It has three parts: the logits of the training checkpoint, the Hugging Face folder and the TurboMind files for the same
ids; the ids of the same prompts from training's tokenisation, transformers 5 and 4, and lmdeploy; and the proof of the
TurboMind folder (`turbomind_proof.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from snaketune.checkpoints.checkpoint_content import read_state_dict
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
from snaketune.settings.schema import default_of
from snaketune.training.train_config import TrainConfig

# Forms of serving that may differ from training, and why.
_LMDEPLOY = ("own system message", "silent", "tool_calls")
_OWN_SYSTEM = (
    "lmdeploy adds its own system message to a conversation that has none; serve with meta_instruction: null, "
    "or send a system message"
)
_TOOL_CALLS = (
    "lmdeploy omits the line break after <|action_end|> for calls sent as OpenAI's tool_calls; send the assistant's "
    "text back exactly as generated"
)
_ONE_BOS = (
    "this base's BOS is also the token that begins a turn, so training's ids start with two of them; lmdeploy removes "
    "one of two equal BOS"
)
_OPENAI_TOOLS = (
    "a server rewrites JSON with its own spacing and puts the list of tools after the system messages; this prompt's "
    "data differ"
)


def compare_models(
    base: str,
    state: Mapping[str, torch.Tensor],
    hf: Path,
    turbomind: Path | None,
    prompts: list[list[int]],
    trust_remote_code: bool = default_of("model.trust_remote_code"),
) -> list[dict[str, Any]]:
    """Compares the logits of the checkpoint, the Hugging Face folder and the TurboMind files.

    Each is compared with its predecessor, whose weights are first rounded to the same dtype. Then only the order of
    summation differs. `rounding_difference` is the effect of the rounding itself.

    Args:
        base: Base model, for its config.
        state: The checkpoint's weights by name.
        hf: Hugging Face folder.
        turbomind: TurboMind workspace, or None.
        prompts: Token ids.
        trust_remote_code: Runs Python code that comes with the model.

    Returns:
        [{"of", "against", "dtype", "relative_difference", "largest_difference", "top1_agreement",
        "rounding_difference"}]

    Raises:
        UserError: Logits differ by more than fp32 rounding explains.
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
    # The folder may lack vocabulary rows without a token.
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
    config: TrainConfig,
    checkpoint: Path,
    record: dict[str, Any],
    trust_remote_code: bool = default_of("model.trust_remote_code"),
) -> Mapping[str, torch.Tensor]:
    """Returns all weights of a trained model. Merges those of a LoRA run here, independently of peft.

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
    """Compares training's ids of prompts with those of other readers.

    Args:
        prompts: Conversations without the answer.
        expected: Their ids in training, from `training_ids`.
        readings: Results of `prompt_readers`.
        tokenizer: The extended tokenizer, to decode differences.

    Returns:
        [{"reader", "prompts", "equal", "differences": [{"prompt", "at", "training", "reader", "why"}]}]; `at` is the
        first token that differs, where both texts start.
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
    """Returns each prompt's ids in training with this encoding, up to the prefix of the assistant's turn."""
    return [
        encode_prompt(prompt, tokenizer, encoding, f"prompt {number}", max_length=None)
        for number, prompt in enumerate(prompts, 1)
    ]


def require_agreement(rows: list[dict[str, Any]]) -> None:
    """Raises a UserError if a reader differs from training without a known reason."""
    for row in rows:
        for each in row["differences"]:
            if each["why"] is None:
                raise UserError(
                    f"{row['reader']} tokenises a prompt differently than training",
                    found=f"prompt {each['prompt']}, token {each['at']}: {each['reader']!r}",
                    expected=repr(each["training"]),
                    fix="do not serve this model with that reader; compare its chat template with training's",
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
    """Returns ids (prompts, longest), padded on the right with 0, and a mask that is True for real ids."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    real = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        real[row, : len(prompt)] = True
    return ids, real


def _embedding(state: Mapping[str, torch.Tensor]) -> str:
    return next(name for name in state if name.endswith("embed_tokens.weight"))
