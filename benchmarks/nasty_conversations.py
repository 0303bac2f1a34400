"""Generates conversations for each case of the format: roles, names, losses, types, glueing, odd texts."""

from __future__ import annotations

import json
import random
from pathlib import Path

_TYPES = {
    "system": ["meta", "icl", "current", "prefix"],
    "user": ["icl", "current", "prefix"],
    "assistant": ["icl", "current", "prefix", "end"],
    "environment": ["icl", "current", "prefix"],
}
_NAMES = ["interpreter", "plugin", "Anna", "", " ", "{name}", "<|plugin|>", "名字", "a\nb", "<s>"]
_TEXTS = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "  two spaces at both ends  ",
    "\tTab\t",
    "\u2581\u2581",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|im_end|>\n<|im_end|>",
    " <s></s> <unk>",
    "<|action_start|><|plugin|>\n{}<|action_end|>\n",
    "<|plugin|>x<|interpreter|>",
    "你好，世界。今天天气怎么样？",
    "こんにちは 안녕하세요 สวัสดี",
    "🙂👩‍👩‍👧‍👦🇩🇪 é é ﷽ ℵ 𝔘𝔫𝔦",
    "\u0000\u0001\u007f\u200b\ufeff\u2028\u00a0",
    'print("hello")\nfor i in range(10):\n    x = x + 1\n',
    '{"name": "get_weather", "arguments": {"city": "上海", "unit": "°C"}}',
    "A plain sentence, with 1234567890 digits and CamelCaseWords.",
    "-0 0 00",
]


def nasty_conversation(rng: random.Random) -> list[dict]:
    """Returns one random conversation that XTuner 0.2.0 accepts."""
    messages: list[dict] = []
    for _ in range(rng.choice([1, 2, 2, 3, 4, 6, 10])):
        glued = messages and rng.random() < 0.4
        role = rng.choice(["tool", "thought"]) if glued else rng.choice(list(_TYPES))
        message: dict = {"role": role, "content": "".join(rng.choices(_TEXTS, k=rng.choice([1, 1, 2, 4])))}
        if rng.random() < 0.4:
            message["name"] = rng.choice([*_NAMES, None])
        if rng.random() < 0.3:
            message["loss"] = rng.choice([True, False, None, 0, 1])
        if rng.random() < 0.4 and not glued:
            silent = "loss" in message and not message["loss"]
            message["type"] = rng.choice(["icl", "current", "meta"] if silent else _TYPES[role])
        if rng.random() < 0.1:
            message["extra"] = {"ignored": [1, None, "x"]}
        messages.append(message)
    return messages


def write_nasty(folder: Path, samples: int, seed: int) -> None:
    """Writes a dataset `nasty` of `samples` conversations, a small one with odd line ends and an empty one.

    Every 5,000th conversation is longer than 32,768 tokens, so it is truncated.
    """
    rng = random.Random(seed)
    file = folder / "nasty" / "processed" / "deep" / "er" / "all kinds.jsonl"
    file.parent.mkdir(parents=True)
    with open(file, "w", encoding="utf-8", newline="") as stream:
        for number in range(samples):
            conversation = nasty_conversation(rng)
            if number % 5000 == 4999:
                long_text = " ".join(rng.choices(["word", "你好", "0", "<|im_end|>", "\n"], k=30_000))
                conversation.insert(0, {"role": "assistant", "content": long_text})
            stream.write(json.dumps(conversation, ensure_ascii=rng.random() < 0.5) + "\n")
    ends = folder / "line_ends" / "processed" / "line ends.v2.jsonl"
    ends.parent.mkdir(parents=True)
    with open(ends, "w", encoding="utf-8", newline="") as stream:
        for number in range(60):
            last = "" if number == 59 else rng.choice(["\n", "\r\n", "\r"])
            stream.write(json.dumps(nasty_conversation(rng), ensure_ascii=False) + last)
    empty = folder / "empty" / "processed" / "empty.jsonl"
    empty.parent.mkdir(parents=True)
    empty.write_bytes(b"")
