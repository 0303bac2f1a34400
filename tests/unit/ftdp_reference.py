"""A reference implementation of XTuner 0.2.0's tokenised format: slow, and one message at a time.

Written from the description of the format, for comparison only. Shares no code with SnakeTune.
"""

from __future__ import annotations

import functools
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
    """Appends tool and thought to the assistant message before them, or starts one."""
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


def prefix_of(message):
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


def compat_turns(messages, encode):
    """Returns [(id, trained)] for each turn; `encode` maps text to ids. Id 0 has no sign, so it is not trained on."""
    turns = []
    for message in glue(messages):
        prefix, suffix = prefix_of(message), "<|im_end|>\n"
        prefix_ids, suffix_ids = encode(prefix), encode(suffix)
        whole = encode(prefix + message["content"] + suffix)
        middle = whole[len(prefix_ids) : len(whole) - len(suffix_ids)]
        turn = [(i, False) for i in prefix_ids]
        turn += [(i, is_trained(message) and i != 0) for i in middle]
        turn += [(i, message["role"] == "assistant" and i != 0) for i in suffix_ids]
        turns.append(turn)
    return turns


def signed_tokens(messages, encode, bos, max_length=32768):
    """Returns the signed ids of a conversation; `encode` maps text to ids."""
    flat = [pair for turn in compat_turns(messages, encode) for pair in turn]
    return [bos, *(i if trained else -i for i, trained in flat)][:max_length]


def straddles(message, encode):
    """True if a turn encoded as a whole does not start and end with the ids of its prefix and suffix."""
    prefix, suffix = encode(prefix_of(message)), encode("<|im_end|>\n")
    whole = encode(prefix_of(message) + message["content"] + "<|im_end|>\n")
    return (
        len(whole) < len(prefix) + len(suffix)
        or whole[: len(prefix)] != prefix
        or whole[len(whole) - len(suffix) :] != suffix
    )


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


def written(template, role, name):
    """Returns prefix and suffix of a message, ([(text, is markup)], text), as the format's makers document it."""
    if template == "internlm2_chat":
        if role == "thought":
            return [], ""
        if role == "tool":
            if name is None:
                return [], "<|action_end|>\n"
            return (
                [("<|action_start|>", True), (MARK.get(name, name), name in MARK), ("\n", True)],
                "<|action_end|>\n",
            )
        mapped = role != "user" and name in MARK
        called = [] if name is None else [(" name=", True), (MARK[name] if mapped else name, mapped)]
        return [("<|im_start|>" + role, True), *called, ("\n", True)], "<|im_end|>\n"
    plugin = role == "system" and name == "plugin"
    if template == "chatml":
        head = "<|im_start|>"
        tools = (
            "system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n",
            "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
            '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
            "<args-json-object>}\n</tool_call><|im_end|>\n",
        )
        table = {
            "tool": ("\n<tool_call>\n", "\n</tool_call>"),
            "thought": ("", ""),
            "environment": (head + "user\n<tool_response>\n", "\n</tool_response><|im_end|>\n"),
        }
        prefix, suffix = table.get(role, (f"{head}{role}\n", "<|im_end|>\n"))
        if plugin:
            prefix, suffix = head + tools[0], tools[1]
    elif template == "llama3":
        shown = {"environment": "ipython"}.get(role, role)
        prefix, suffix = f"<|start_header_id|>{shown}<|end_header_id|>\n\n", "<|eot_id|>"
        if plugin:
            prefix += "Environment: ipython\n\n"
        if role in ("tool", "thought"):
            prefix, suffix = "<|python_tag|>" if role == "tool" else "", ""
    else:
        prefix, suffix = {
            "system": ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]") if plugin else ("", "\n\n"),
            "user": ("[INST]", "[/INST]"),
            "assistant": ("", "</s>"),
            "environment": ("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
            "tool": ("[TOOL_CALLS]", ""),
            "thought": ("", ""),
        }[role]
    return [(prefix, True)], suffix


def exact_turns(messages, template="internlm2_chat"):
    """Returns the text for `mask: exact` as [(text, trained, written by the format)] for each turn.

    Each message decides for itself, and the suffix of a turn goes with the message before it.
    """
    turns, closing, owner, turn_trained, waiting = [], [], None, False, []
    for message in messages:
        role, content = message["role"], message["content"]
        prefix, suffix = written(template, role, message.get("name"))
        glued = role in ("tool", "thought")
        if glued:
            if owner != "assistant":
                if turns:
                    turns[-1] += closing
                opened, assistant_suffix = written(template, "assistant", None)
                turns.append([(text, False, markup) for text, markup in opened])
                owner, turn_trained = "assistant", True
            trained = bool(message["loss"]) if "loss" in message else turn_trained
        else:
            if turns:
                turns[-1] += closing
            trained = turn_trained = is_trained(message)
            if template == "mistral_instruct" and role == "system" and message.get("name") != "plugin":
                waiting += [(content, False, False), (suffix, False, True)]
                closing = []
                continue
            owner, assistant_suffix = role, suffix
            turns.append([])
        turns[-1] += [(text, trained and glued, markup) for text, markup in prefix]
        turns[-1] += waiting
        waiting = []
        turns[-1].append((content, trained, False))
        if glued:
            turns[-1].append((suffix, trained, True))
        closing = [(assistant_suffix, trained and owner == "assistant", True)]
    if turns:
        turns[-1] += closing
    return turns


def exact_tokens(messages, tokenizer, literal, template="internlm2_chat"):
    """Returns [(id, trained)] for `mask: exact`. All control tokens of the `tokenizers.Tokenizer` must be special."""
    return spans_to_tokens(
        [span for turn in exact_turns(messages, template) for span in turn], tokenizer, literal
    )


def spans_to_tokens(spans, tokenizer, literal):
    """Matches each token's spelling with the text, instead of using offsets.

    Control tokens that are text go through the library's own `encode_special_tokens`, one stretch between control
    tokens at a time.
    """
    cut, plain, underscore = _prepared(tokenizer)
    out, stretch = [], []

    def flush():
        text = "".join(part for part, _ in stretch)
        if text:
            ids = plain.encode(text, add_special_tokens=False).ids
            marks = [trained for part, trained in stretch for _ in part.encode()]
            out.extend(_signs(text, marks, ids, plain, underscore))
        stretch.clear()

    for text, trained, markup in spans:
        # A control token could span two spans only if both are typed text, which no test does.
        for place, part in enumerate(cut.split(text) if markup or not literal else [text]):
            if place % 2:
                flush()
                out.append((tokenizer.token_to_id(part), trained))
            elif part:
                stretch.append((part, trained))
    flush()
    return out


@functools.cache
def _prepared(tokenizer):
    """Returns a pattern of the control tokens, the tokenizer that reads them as text, and whether it writes "▁"."""
    special = [str(t) for t in tokenizer.get_added_tokens_decoder().values()]
    cut = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
    plain = type(tokenizer).from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return cut, plain, tokenizer.token_to_id("▁") is not None


def _signs(text, marks, ids, tokenizer, underscore):
    """Returns [(id, trained)] for a stretch; `marks` has one flag per byte of `text`."""
    whole = text.encode()
    if underscore:
        # The tokenizer replaces spaces with "▁" and prepends one.
        spelled = ["▁".encode() if c == " " else c.encode() for c in text]
        marks = [marks[len(text[:i].encode())] for i, c in enumerate(spelled) for _ in c]
        marks = [marks[0]] * 3 + marks
        whole = "▁".encode() + b"".join(spelled)
    back = {c: b for b, c in _byte_characters().items()}
    at, result = 0, []
    for token in ids:
        name = tokenizer.id_to_token(token)
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            raw = bytes([int(name[3:5], 16)])
        elif underscore:
            raw = name.encode()
        else:
            raw = bytes(back[c] for c in name)
        assert whole[at : at + len(raw)] == raw, (whole, at, raw)
        result.append((token, any(marks[at : at + len(raw)])))
        at += len(raw)
    assert at == len(whole)
    return result


def _byte_characters():
    """Returns GPT-2's table: printable bytes map to themselves, the others to characters from 256 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + n) for n, b in enumerate(others)}
