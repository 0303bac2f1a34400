"""Reads prompts as other programs do: their ids by transformers' chat template and lmdeploy's own, and their logits.

Runs in the training environment (transformers 5) and the converter's (transformers 4, lmdeploy 0.9.2), and imports only
packages that both have.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from snaketune.chat_files.prompts import read_prompts
from snaketune.chat_format.chat_template import ChatTemplate
from snaketune.checkpoints.safetensors_files import open_safetensors
from snaketune.parity.long_prompts import long_batch, reachable_length
from snaketune.parity.model_logits import folder_logits, prompts_batch, top_values
from snaketune.settings.schema import default_of

PROMPTS = Path(__file__).with_name("parity_prompts.json")
Message = Mapping[str, Any]


def parity_prompts(own: Path | None) -> list[list[dict[str, Any]]]:
    """Returns the shipped prompts, with tool calls and their results, and those of the user's file.

    Raises:
        UserError: The file is not a list of conversations.
    """
    return read_prompts(PROMPTS) + (read_prompts(own) if own else [])


def read_with_transformers(
    folder: Path, prompts: list[list[Message]], openai: bool = False
) -> dict[str, Any]:
    """Returns the ids of each prompt from `apply_chat_template` of the folder's tokenizer.

    With `openai`, plugins, calls and results are in OpenAI's format, as servers receive them.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = [openai_request(prompt) if openai else (prompt, None) for prompt in prompts]
    # The template writes BOS itself. Render to text first: `tokenize=True` differs between transformers 4 and 5.
    texts = [
        tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        for messages, tools in requests
    ]
    return {
        "reader": f"transformers {importlib.metadata.version('transformers')}" + ", OpenAI's tools" * openai,
        "form": "openai" if openai else "plain",
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
    }


def read_logits(
    folder: Path,
    prompts: list[list[int]],
    trust_remote_code: bool = default_of("model.trust_remote_code"),
) -> dict[str, Any]:
    """Returns the largest logits of prompts as this environment's transformers computes them from a folder.

    Args:
        folder: Hugging Face folder.
        prompts: Token ids.
        trust_remote_code: Runs Python code that comes with the model.

    Returns:
        {"reader", "unread": None, "prompts": see `top_values`, "long": the same of a prompt beyond the attention window,
        with its "tokens", or None}, or {"reader", "unread": why this version does not load the model}
    """
    reader = f"transformers {importlib.metadata.version('transformers')}"
    try:
        logits = _logits(folder, prompts, trust_remote_code)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines() or [""]
        return {"reader": reader, "unread": f"{type(error).__name__}: {reason[0][:300]}"}
    return {"reader": reader, "unread": None, **logits}


def _logits(folder: Path, prompts: list[list[int]], trust_remote_code: bool) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # Its sdpa ignores a cap of the scores.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    known = AutoModelForCausalLM._model_mapping.get(type(config), None)
    eager = capped or not getattr(known, "_supports_sdpa", False)
    size = sum(each.shape.numel() for each in open_safetensors(folder).stored.values())
    length = reachable_length(config, size, eager)
    batches = [prompts_batch(prompts), *([long_batch(prompts, length)] if length else [])]
    short, *long = folder_logits(
        folder, batches, attention="eager" if capped else None, trust_remote_code=trust_remote_code
    )
    return {
        "prompts": top_values(short),
        "long": {"tokens": length, **top_values(long[0])} if long else None,
    }


def read_with_lmdeploy(
    folder: Path, prompts: list[list[Message]], template: ChatTemplate, name: str
) -> list[dict[str, Any]]:
    """Returns the ids of each prompt from lmdeploy's template `name` and tokenizer, for three ways of serving.

    Args:
        folder: Folder of the tokenizer.
        prompts: Conversations in the ftdp format.
        template: Template of the training; writes the assistant turns that a client sends back to a server.
        name: One of lmdeploy's built-in templates.
    """
    from snaketune.export.turbomind_convert import import_converter

    import_converter()
    from lmdeploy.model import MODELS
    from lmdeploy.tokenizer import Tokenizer

    tokenizer = Tokenizer(str(folder))
    plain, silent = MODELS.get(name)(), MODELS.get(name)(meta_instruction=None)
    raw = [served_messages(prompt, template) for prompt in prompts]
    calls = [served_messages(openai_messages(prompt), template) for prompt in prompts]
    reader = f"lmdeploy {importlib.metadata.version('lmdeploy')} {name}"
    return [
        {
            "reader": reader + words,
            "form": form,
            "ids": [tokenizer.encode(writer.messages2prompt(each)) for each in messages],
        }
        for form, words, writer, messages in (
            ("own system message", "", plain, raw),
            ("silent", ", meta_instruction: null", silent, raw),
            ("tool_calls", ", meta_instruction: null, OpenAI's tool_calls", silent, calls),
        )
    ]


def served_messages(prompt: list[Message], template: ChatTemplate) -> list[dict[str, Any]]:
    """Returns a conversation as a client sends it to a server, with the assistant's text exactly as generated.

    Messages within an assistant's turn (tool calls, thoughts) become part of its content; `tool_calls` stay.
    """

    def is_answer(message: Message) -> bool:
        return message["role"] == "assistant" or template.roles[message["role"]].part_of == "assistant"

    served: list[dict[str, Any]] = []
    for answer, group in groupby(prompt, is_answer):
        messages = list(group)
        if not answer:
            served += map(dict, messages)
            continue
        for turn in template.turns(messages):
            served.append({"role": "assistant", "content": turn.content})
        calls = [call for message in messages for call in message.get("tool_calls", [])]
        if calls:
            served[-1]["tool_calls"] = calls
    return served


def openai_request(prompt: list[Message]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Converts a conversation in the ftdp format to the messages and tools of an OpenAI request."""
    messages: list[dict[str, Any]] = []
    tools = None
    for message in openai_messages(prompt):
        plugin = message.get("name") == "plugin"
        if plugin and message["role"] == "system":
            tools = [{"type": "function", "function": each} for each in json.loads(message["content"])]
        elif plugin and message["role"] == "environment":
            messages.append({"role": "tool", "tool_call_id": "call", "content": message["content"]})
        else:
            messages.append(message)
    return messages, tools


def openai_messages(prompt: list[Message]) -> list[dict[str, Any]]:
    """Returns a conversation with its plugin calls as OpenAI's `tool_calls`; code stays a separate message."""
    result: list[dict[str, Any]] = []
    for message in prompt:
        if message["role"] == "tool" and message.get("name") == "plugin":
            call = json.loads(message["content"])
            function = {"name": call["name"], "arguments": json.dumps(call["parameters"], ensure_ascii=False)}
            if not result or result[-1]["role"] != "assistant":
                result.append({"role": "assistant", "content": ""})
            result[-1].setdefault("tool_calls", []).append({"type": "function", "function": function})
        else:
            result.append(dict(message))
    return result
