"""XTuner 0.2.0's tokenised format by the book: slow, one message at a time, sharing no code with `ftdp`.

Written from the description of the format, for comparison only.
"""

from __future__ import annotations

import io
import json

import numpy as np

MARK = {"plugin": "<|plugin|>", "interpreter": "<|interpreter|>"}
ALWAYS_SILENT = {
    "system": "meta icl current prefix",
    "user": "icl current prefix",
    "environment": "icl current prefix",
}


def glue(messages):
    """tool and thought become text of the assistant's message before them, or open one."""
    merged = []
    for message in messages:
        role = message["role"]
        if role not in ("tool", "thought"):
            merged.append(dict(message))
            continue
        text = message["content"]
        if role == "tool":
            name = message.get("name")
            if name is not None:
                text = f"<|action_start|>{MARK.get(name, name)}\n" + text
            text = text + "<|action_end|>\n"
        if merged[-1]["role"] == "assistant":
            merged[-1]["content"] = merged[-1]["content"] + text
        else:
            merged.append({"role": "assistant", "content": text})
    return merged


def begin_of(message):
    role, name = message["role"], message.get("name")
    if name is None:
        return "<|im_start|>" + role + "\n"
    if role != "user" and name in MARK:
        name = MARK[name]
    return "<|im_start|>" + role + " name=" + name + "\n"


def is_trained(message):
    kind = message.get("type", "current")
    if not message.get("loss", True):
        assert kind in ("icl", "current", "meta")
        return False
    if message["role"] == "assistant":
        return {"icl": True, "current": True, "prefix": False, "end": True}[kind]
    assert kind in ALWAYS_SILENT[message["role"]].split()
    return False


def signed_tokens(messages, encode, bos, max_length=32768):
    """Signed ids of a conversation; `encode` maps a text to its ids."""
    out = [bos]
    for message in glue(messages):
        begin, end = begin_of(message), "<|im_end|>\n"
        begin_ids, end_ids = encode(begin), encode(end)
        whole = encode(begin + message["content"] + end)
        middle = whole[len(begin_ids) : len(whole) - len(end_ids)]
        out.extend(-i for i in begin_ids)
        out.extend(middle if is_trained(message) else [-i for i in middle])
        out.extend(end_ids if message["role"] == "assistant" else [-i for i in end_ids])
    return out[:max_length]


def bin_and_meta(conversations, encode, bos, max_length=32768):
    """Returns {"train": (bin, meta), "valid": (bin, meta) or None} as bytes."""
    samples = [signed_tokens(each, encode, bos, max_length) for each in conversations]
    copies = samples[99::100]
    return {"train": _files(samples), "valid": _files(copies) if len(copies) > 500 else None}


def _files(samples):
    data, rows = b"", []
    for tokens in samples:
        rows.append((len(data), len(tokens)))
        data += (json.dumps({"tokens": tokens}) + "\n").encode()
    meta = io.BytesIO()
    np.save(meta, rows)
    return data, meta.getvalue()
