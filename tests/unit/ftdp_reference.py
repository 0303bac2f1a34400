"""XTuner 0.2.0's tokenised format by the book: slow, one message at a time, sharing no code with `ftdp`.

Written from the description of the format, for comparison only.
"""

from __future__ import annotations

import io
import json
import re

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


def exact_spans(messages):
    """The text of `mask: exact` as [(text, trained, written by the format)]: each message answers for itself."""
    spans, closing = [], None
    owner = None
    for message in messages:
        role, content = message["role"], message["content"]
        if role in ("tool", "thought"):
            if owner != "assistant":
                spans += closing or []
                spans.append(("<|im_start|>assistant\n", False, True))
                owner, turn_trained = "assistant", True
            trained = bool(message["loss"]) if "loss" in message else turn_trained
            if role == "tool" and message.get("name") is not None:
                name = message["name"]
                spans.append(("<|action_start|>", trained, True))
                spans.append((MARK.get(name, name), trained, name in MARK))
                spans.append(("\n", trained, True))
            spans.append((content, trained, False))
            if role == "tool":
                spans.append(("<|action_end|>\n", trained, True))
        else:
            spans += closing or []
            owner, trained = role, is_trained(message)
            turn_trained = trained
            name = message.get("name")
            spans.append(("<|im_start|>" + role, False, True))
            if name is not None:
                mapped = role != "user" and name in MARK
                spans.append((" name=", False, True))
                spans.append((MARK[name] if mapped else name, False, mapped))
            spans.append(("\n", False, True))
            spans.append((content, trained, False))
        closing = [("<|im_end|>\n", trained and owner == "assistant", True)]
    return spans + (closing or [])


def exact_tokens(messages, tokenizer, literal):
    """Signed ids of `mask: exact`; `tokenizer` is a `tokenizers.Tokenizer` whose control tokens are all special.

    Looks at what each token spells instead of at offsets. Control tokens that are text go through the library's own
    `encode_special_tokens`, one stretch between control tokens at a time.
    """
    special = [str(t) for t in tokenizer.get_added_tokens_decoder().values()]
    cut = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
    plain = type(tokenizer).from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    out, stretch = [], []

    def flush():
        text = "".join(part for part, _ in stretch)
        if text:
            ids = plain.encode(text, add_special_tokens=False).ids
            marks = [trained for part, trained in stretch for _ in part.encode()]
            out.extend(_signs(text, marks, ids, plain))
        stretch.clear()

    for text, trained, markup in exact_spans(messages):
        # A control token may be made of two spans only where both are typed text, which the tests do not do.
        for place, part in enumerate(cut.split(text) if markup or not literal else [text]):
            if place % 2:
                flush()
                token = tokenizer.token_to_id(part)
                out.append(token if trained else -token)
            elif part:
                stretch.append((part, trained))
    flush()
    return out


def _signs(text, marks, ids, tokenizer):
    """Signs the ids of a stretch; `marks` holds one flag a byte of `text`. A byte's neighbours in its character count."""
    whole = text.encode()
    if "▁" in tokenizer.get_vocab():
        # The tokenizer writes "▁" for a space and puts one in front.
        spelled = ["▁".encode() if c == " " else c.encode() for c in text]
        marks = [marks[len(text[:i].encode())] for i, c in enumerate(spelled) for _ in c]
        marks = [marks[0]] * 3 + marks
        whole = "▁".encode() + b"".join(spelled)
    back = {c: b for b, c in _byte_characters().items()}
    at, signed = 0, []
    for token in ids:
        name = tokenizer.id_to_token(token)
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            raw = bytes([int(name[3:5], 16)])
        elif "▁" in tokenizer.get_vocab():
            raw = name.encode()
        else:
            raw = bytes(back[c] for c in name)
        assert whole[at : at + len(raw)] == raw, (whole, at, raw)
        signed.append(token if any(marks[at : at + len(raw)]) else -token)
        at += len(raw)
    assert at == len(whole)
    return signed


def _byte_characters():
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + n) for n, b in enumerate(others)}
