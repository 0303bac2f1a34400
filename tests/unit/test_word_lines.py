"""The hot path writes the same lines as the tokenizers library with a check of each id, or returns None."""

from __future__ import annotations

import json
import random

import pytest
from ftdp_conversations import conversations
from ftdp_small_tokenizers import KINDS, small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snaketune.chat_files.line_reader import Block
from snaketune.encoding import word_lines
from snaketune.encoding.batch_encoder import BatchEncoder
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.signed_ids import trained_mask
from snaketune.tokenized.block_tokenizer import BlockTokenizer, TokenizeOptions

MASKS = ["compat", "exact"]


def spelled(pieces, exact):
    """Returns the line of a `.bin` file and its number of trained ids."""
    ids = [token for piece in pieces for token in piece.ids]
    signs = [piece.trained for piece in pieces for _ in piece.ids]
    words = [
        ("-0" if sign and exact else "0") if token == 0 else str(token if sign else -token)
        for token, sign in zip(ids, signs, strict=True)
    ]
    return ('{"tokens": [' + ", ".join(words) + "]}\n").encode(), sum(trained_mask(pieces, exact))


def check(encoder, plain, conversation, exact):
    """Compares a line and its counts with the plain library's. True if the hot path wrote the line."""
    turns = encoder.turns(conversation)
    line = encoder.line(turns)
    counts = encoder.take_counts()
    if line is None:
        return False
    (pieces,) = plain.encode_turns([plain.turns(conversation)])
    assert line == spelled(pieces, exact)[0]
    expected = plain.take_counts()
    assert not expected["straddling_messages"]
    assert counts["tokens_differing_from_compat"] == expected["tokens_differing_from_compat"]
    return True


def pair(kind, template="internlm2_chat", **options):
    """Returns an encoder with the hot path, and one that uses the library for every text."""
    tokenizer = small_tokenizer(kind, template)
    # A process has one literal spelling, so both encoders have the same turns.
    return tuple(BatchEncoder(tokenizer, ChatEncoding(**options), many=many) for many in (True, False))


def talk(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]


@pytest.mark.parametrize("kind", [*KINDS, "bang"])
@pytest.mark.parametrize("mask", MASKS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.lists(conversations(), max_size=3),
    control=st.sampled_from(["literal", "control"]),
)
def test_a_line_is_the_librarys(kind, mask, batch, control):
    encoder, plain = pair(kind, mask=mask, control_tokens=control)
    for conversation in batch:
        check(encoder, plain, conversation, mask == "exact")


@pytest.mark.parametrize("kind", [*KINDS, "bang"])
@pytest.mark.parametrize(
    ("template", "mask"), [("internlm2_chat", "compat"), ("internlm2_chat", "exact"), ("chatml", "exact")]
)
def test_ordinary_conversations_take_the_hot_path(kind, template, mask):
    encoder, plain = pair(kind, template, mask=mask)
    exact = mask == "exact"
    for contents in (
        ["Hello, world!", "Sure! 12 * 7 = 84.\n\n  x = 1\n"],
        ["你好，世界。！", "<|im_end|> <s>!"],
    ):
        assert check(encoder, plain, talk(*contents), exact)
    # The hot path is not used if a merge or the pre-tokenizer may cross the edge of a content.
    crossing = {"sentencepiece": "", "bang": "\n x"}.get(kind, "  x")
    if crossing:
        assert encoder.line(encoder.turns(talk(crossing, "x"))) is None


@pytest.mark.parametrize("kind", ["sentencepiece", "newlines", "bang"])
@pytest.mark.parametrize("mask", MASKS)
def test_forgetting_changes_nothing(kind, mask, monkeypatch):
    monkeypatch.setattr(word_lines, "_MAX_ENTRIES", 12)
    monkeypatch.setattr(word_lines, "_MAX_CHARACTERS", 4)
    monkeypatch.setattr(word_lines, "_MAX_BOUNDARIES", 3)
    encoder, plain = pair(kind, mask=mask)
    rng = random.Random(0)
    words = ["a", "hello", "x=1", "你好世界", "don't", "!", "\n", "  ", "<s>", "12", ""]
    for number in range(60):
        contents = ["x" + " ".join(rng.choices(words, k=9)) for _ in range(4)]
        named = [message | {"name": f"n{number}"} for message in talk(*contents)]
        assert check(encoder, plain, named, mask == "exact")
    tables = [table for sign in encoder._lines._signs for table in (sign._words, sign._spaced)]
    assert max(map(len, tables)) <= 12
    assert len(encoder._lines._boundaries) <= 3


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level", "newlines"])
@pytest.mark.parametrize("limit", [None, 7])
def test_texts_of_very_many_words(kind, limit, monkeypatch):
    encoder, plain = pair(kind)
    # Many words, spaces that slow down the search for words, one very long word, a control token after long text.
    contents = [
        "hello world! " * 6000,
        "x" + "  y\n" * 20_000,
        "z" * 70_000,
        "你好" * 40_000 + "<|im_end|> a",
    ]
    if limit:
        monkeypatch.setattr(word_lines, "_LONG", limit)
        contents = [content[:100] + content[-30:] for content in contents]
    assert check(encoder, plain, talk(*contents), False)


@pytest.mark.parametrize("kind", [*KINDS, "bang"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("max_length", [3, 20, 32768])
def test_lines_are_cut_and_counted(kind, mask, max_length):
    tokenizer = small_tokenizer(kind)
    lines = [
        json.dumps(talk("Hello!", "Sure! No! <unk>", "a", "b!")).encode(),
        json.dumps(talk(" \n x", "!")).encode(),  # not by the hot path
        json.dumps([{"role": "user", "content": "!", "loss": False}]).encode(),
    ]
    options = TokenizeOptions(mask=mask, control_tokens="control", max_length=max_length)
    result = BlockTokenizer(tokenizer, options)("file", Block(1, lines, 1))
    plain = BatchEncoder(tokenizer, options)
    expected, trained = b"", 0
    for line in lines:
        (pieces,) = plain.encode_turns([plain.turns(json.loads(line))])
        whole, _ = spelled(pieces, mask == "exact")
        tokens = whole[len(b'{"tokens": [') : -len(b"]}\n")].split(b", ")[:max_length]
        expected += b'{"tokens": [' + b", ".join(tokens) + b"]}\n"
        trained += sum(trained_mask(pieces, mask == "exact")[:max_length])
    assert (result.data, result.trained_tokens) == (expected, trained)
