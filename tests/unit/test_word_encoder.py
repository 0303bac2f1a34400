"""The faster encoder gives the tokenizer's ids, or is not used."""

from __future__ import annotations

import json
import random

import pytest
from ftdp_small_tokenizers import sentencepiece_model, small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from snaketune.chat_format.template_file import load_template
from snaketune.encoding.batch_encoder import BatchEncoder
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.sentencepiece_bpe import build_tokenizer_json
from snaketune.encoding.word_encoder import word_encoder
from snaketune.encoding.word_rules import word_rules

SPECIAL_TOKENS = load_template("internlm2_chat").special_tokens
turns = load_template("internlm2_chat").turns

fragments = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "▁",
        "▁▁",
        "hello",
        "world",
        "你好",
        "🙂",
        "<s>",
        "</s>",
        "<unk>",
        "<",
        "s>",
        "don't",
        ".\n\n",
        "\r\n",
        "\x1c",
        "\u3000",
        "e\u0301",
        "\u0958",
        "12",
        "，",
        *SPECIAL_TOKENS,
    ]
)
texts = st.lists(st.one_of(fragments, st.text(max_size=6)), max_size=12).map("".join)


def plain_ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def changed(tokenizer, change):
    data = json.loads(tokenizer.to_str())
    change(data)
    return Tokenizer.from_str(json.dumps(data))


def tokenizer_of(kind):
    """Returns a small tokenizer; "nfc" is like Qwen's."""
    if kind != "nfc":
        return small_tokenizer(kind).tokenizer
    tokenizer = changed(small_tokenizer("newlines").tokenizer, lambda data: None)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level", "newlines", "nfc"])
@settings(max_examples=250, deadline=None)
@given(batch=st.lists(texts, max_size=5))
def test_ids_are_the_tokenizers(kind, batch):
    tokenizer = tokenizer_of(kind)
    encoder = word_encoder(tokenizer)
    for _ in range(2):  # the second time from the cache
        assert encoder.encode(batch) == {text: plain_ids(tokenizer, text) for text in batch}


def pieces(tokenizer, texts):
    """Returns the pre-tokenizer's pieces of texts. Merges stay within a piece."""
    normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    return [piece for text in texts for piece, _ in split(normalize(text))]


@pytest.mark.parametrize("kind", ["byte_level", "newlines", "nfc"])
@settings(max_examples=250, deadline=None)
@given(text=texts)
def test_words_begin_where_the_pre_tokenizer_cuts(kind, text):
    tokenizer = tokenizer_of(kind)
    words = word_rules(tokenizer, tokenizer.to_str()).words.findall(text)
    assert "".join(words) == text
    assert pieces(tokenizer, words) == pieces(tokenizer, [text])


@pytest.mark.parametrize("kind", ["byte_level", "newlines", "nfc"])
def test_every_character_is_for_the_library_what_it_is_here(kind):
    tokenizer = tokenizer_of(kind)
    find = word_rules(tokenizer, tokenizer.to_str()).words.findall
    every = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    for text in (f"{character}!a{character}\n" for character in every):
        assert pieces(tokenizer, find(text)) == pieces(tokenizer, [text]), text


def test_forgetting_keeps_the_ids(monkeypatch):
    tokenizer = small_tokenizer("sentencepiece").tokenizer
    encoder = word_encoder(tokenizer)
    monkeypatch.setattr(encoder, "_MAX_WORDS", 20)
    monkeypatch.setattr(encoder, "_MAX_LENGTH", 4)
    rng = random.Random(0)
    for _ in range(200):
        batch = [" ".join(rng.choices(["a", "hello", "x=1", "你好世界", "<s>", ""], k=9)) for _ in range(3)]
        assert encoder.encode(batch) == {text: plain_ids(tokenizer, text) for text in batch}
    assert len(encoder._known) < 60


def test_real_tokenizer_and_conversations(shared_data):
    tokenizer = Tokenizer.from_file(str(shared_data / "mistral_v1_tokenizer" / "tokenizer.json"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    encoder = word_encoder(tokenizer)
    for source in sorted((shared_data / "ftdp").rglob("*.jsonl")):
        lines = source.read_text(encoding="utf-8").splitlines()
        batch = [
            turn.prefix + turn.content + turn.suffix for line in lines for turn in turns(json.loads(line))
        ]
        encodings = tokenizer.encode_batch(batch, add_special_tokens=False)
        assert encoder.encode(batch) == dict(zip(batch, (each.ids for each in encodings), strict=True))


def with_merge(left, right):
    def change(data):
        vocabulary = data["model"]["vocab"]
        for entry in (left, right, left + right):
            vocabulary.setdefault(entry, len(vocabulary) + 50)
        data["model"]["merges"].append([left, right])

    return change


def test_where_it_would_not_be_exact_it_is_not_used(tmp_path):
    tokenizer = small_tokenizer("sentencepiece").tokenizer
    assert word_encoder(tokenizer) is not None
    unlike = [
        with_merge("a", "▁"),
        with_merge("<0x41>", "b"),
        lambda data: data["model"].update(ignore_merges=True),
        lambda data: data["model"].update(byte_fallback=False),
        lambda data: data["model"].update(dropout=0.1),
        lambda data: data["normalizer"]["normalizers"].pop(0),
        lambda data: data["added_tokens"][-1].update(lstrip=True),
        lambda data: data["added_tokens"][-1].update(normalized=True),
    ]
    for change in unlike:
        assert word_encoder(changed(tokenizer, change)) is None
    metaspace = changed(tokenizer, lambda data: None)
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    assert word_encoder(metaspace) is None
    with_space = changed(tokenizer, lambda data: None)
    with_space.add_tokens([AddedToken("▁tool", normalized=False)])
    assert word_encoder(with_space) is None
    byte_level = small_tokenizer("newlines").tokenizer
    unlike = [
        lambda data: data["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+|\W+"),
        lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"),
        lambda data: data["pre_tokenizer"]["pretokenizers"].pop(),
        lambda data: data["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda data: data.update(normalizer={"type": "Lowercase"}),
        lambda data: data["added_tokens"][-1].update(rstrip=True),
        lambda data: data["model"].update(dropout=0.1),
    ]
    for change in unlike:
        assert word_encoder(changed(byte_level, change)) is None
    no_dummy_prefix = build_tokenizer_json(sentencepiece_model(tmp_path / "plain", add_dummy_prefix=False))
    assert word_encoder(no_dummy_prefix) is None


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_the_batch_encoder_gives_the_same_either_way(kind):
    tokenizer = small_tokenizer(kind)
    messages = [
        {"role": "system", "name": "plugin", "content": "  two  spaces\n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": " hello <|im_end|> world"},
        {"role": "tool", "name": "interpreter", "content": "print(1)"},
    ]
    results = []
    for many in (True, False):
        encoder = BatchEncoder(tokenizer, ChatEncoding(), many=many)
        results.append(encoder.encode_turns([encoder.turns(messages), encoder.turns(messages[:2]), []]))
    assert results[0] == results[1]
