"""Random conversations with all roles, names, losses, types, and texts that are hard for tokenizers."""

from __future__ import annotations

from hypothesis import strategies as st

SILENT_TYPES = ["icl", "current", "meta"]
TYPES = {
    "system": ["meta", "icl", "current", "prefix"],
    "user": ["icl", "current", "prefix"],
    "assistant": ["icl", "current", "prefix", "end"],
    "environment": ["icl", "current", "prefix"],
}
CONTROL = ["<|im_end|>", "<|im_start|>", "<s>", "<unk>", "<|plugin|>"]
PLAIN = ["", " ", "\n", "\n\n", "  ", "▁", "你好", "🙂", "\x00", "é", "hello", ".\n", "|>", "im_end"]


def texts(control: bool = True):
    fragments = st.sampled_from([*PLAIN, *(CONTROL if control else [])])
    return st.lists(st.one_of(fragments, st.text(max_size=12)), max_size=5).map("".join)


def names():
    return st.one_of(st.sampled_from(["plugin", "interpreter", "", "{name}", None]), st.text(max_size=6))


@st.composite
def messages(draw, first: bool = False, control: bool = True):
    role = draw(st.sampled_from([*TYPES, *([] if first else ["tool", "thought"])]))
    message = {"role": role, "content": draw(texts(control))}
    if draw(st.booleans()):
        message["name"] = draw(names())
    if draw(st.booleans()):
        message["loss"] = draw(st.sampled_from([True, False, None, 0, 1]))
    if role in TYPES and draw(st.booleans()):
        silent = not message.get("loss", True)
        message["type"] = draw(st.sampled_from(SILENT_TYPES if silent else TYPES[role]))
    if role not in TYPES and draw(st.booleans()):
        message["type"] = "what a glued message says here does not count"
    return message


@st.composite
def conversations(draw, control: bool = True):
    length = draw(st.integers(0, 6))
    return [draw(messages(first=index == 0, control=control)) for index in range(length)]
