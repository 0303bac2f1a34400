"""Compares the ids of the same prompts from training's tokenisation, transformers 5 and 4, and lmdeploy.

This is one part of the parity check after conversion. The others are the logits (`logit_parity.py`) and the proof of the
TurboMind folder (`turbomind_proof.py`).
"""

from __future__ import annotations

from typing import Any

from snaketune.common.cli import UserError
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.prompt_ids import encode_prompt
from snaketune.encoding.tokenizer import ExtendedTokenizer

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
