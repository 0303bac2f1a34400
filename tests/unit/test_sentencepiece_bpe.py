"""Compares our tokenizer.json of a SentencePiece model with sentencepiece itself and with the real Mistral."""

from __future__ import annotations

import json
import shutil

import pytest
import sentencepiece
from ftdp_small_tokenizers import sentencepiece_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from snaketune.common.cli import UserError
from snaketune.encoding.base_tokenizer import open_tokenizer, read_base
from snaketune.encoding.sentencepiece_bpe import build_tokenizer_json, read_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return sentencepiece_model(tmp_path_factory.mktemp("spm"), user_defined_symbols=["<tool>"])


@pytest.fixture(scope="module")
def pair(model_path):
    return build_tokenizer_json(model_path), sentencepiece.SentencePieceProcessor(model_file=str(model_path))


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=8),
            st.sampled_from([" ", "  ", "\n", "hello", "x = 1", "你好", "🙂", "é", "world "]),
        ),
        max_size=8,
    ).map("".join)
)
def test_ids_equal_sentencepiece(pair, text):
    # sentencepiece drops NUL and treats the names of its tokens differently, so leave both out.
    text = text.replace("\x00", "").replace("<", "(")
    tokenizer, processor = pair
    expected = processor.encode(text) if text else []
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected


def test_special_tokens_and_decoding(pair):
    tokenizer, processor = pair
    assert tokenizer.encode("hello").ids[0] == processor.bos_id()
    assert tokenizer.encode("<s>a</s><tool>", add_special_tokens=False).ids[0] == processor.bos_id()
    assert tokenizer.token_to_id("<tool>") == processor.piece_to_id("<tool>")
    added = {entry["content"]: entry["special"] for entry in json.loads(tokenizer.to_str())["added_tokens"]}
    assert added == {"<unk>": True, "<s>": True, "</s>": True, "<tool>": False}
    text = "hello world\n你好 🙂  x = 1"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_settings_of_the_model(tmp_path):
    plain = sentencepiece_model(tmp_path / "plain", add_dummy_prefix=False)
    tokenizer = build_tokenizer_json(plain)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(plain))
    for text in ("hello world", " hello", "你好"):
        assert tokenizer.encode(text, add_special_tokens=False).ids == processor.encode(text)
    assert not read_model(plain).add_dummy_prefix
    normalizing = sentencepiece_model(tmp_path / "nfkc", normalization_rule_name="nmt_nfkc")
    with pytest.warns(UserWarning, match="normalises"):
        build_tokenizer_json(normalizing)


def test_what_is_refused(tmp_path):
    unigram = sentencepiece_model(tmp_path / "unigram", model_type="unigram", vocab_size=330)
    with pytest.raises(UserError, match=r"is not a BPE model(.|\n)*tokenizer\.json"):
        build_tokenizer_json(unigram)
    bad = tmp_path / "bad.model"
    for data in (b"", b"version https://git-lfs.github.com/spec/v1\n", unigram.read_bytes()[:-5000][:999]):
        bad.write_bytes(data)
        with pytest.raises(UserError, match="not a SentencePiece"):
            build_tokenizer_json(bad)


def test_added_tokens_beside_the_model(tmp_path, model_path):
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(model_path, folder / "tokenizer.model")
    size = len(read_model(model_path).pieces)
    entry = {"content": "<|im_end|>", "special": True, "normalized": False}
    config = {"bos_token": "<s>", "added_tokens_decoder": {str(size): entry, "1": {"content": "<s>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    extended = open_tokenizer(folder, tmp_path / "x")
    assert extended.ids["<|im_end|>"] == size
    assert sorted(extended.added.values()) == list(range(size + 1, size + 6))
    config["added_tokens_decoder"] = {str(size + 3): entry}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot have the id"):
        open_tokenizer(folder, tmp_path / "y")


def test_the_bare_file_is_enough(tmp_path, model_path):
    text, folder = read_base(model_path)
    assert folder == model_path.parent
    assert Tokenizer.from_str(text).get_vocab_size() == len(read_model(model_path).pieces)
    assert open_tokenizer(model_path, tmp_path / "x").bos_token_id == 1


def test_real_mistral(shared_data):
    folder = shared_data / "mistral_v1_tokenizer"
    built = json.loads(build_tokenizer_json(folder / "tokenizer.model").to_str())
    theirs = json.loads(Tokenizer.from_file(str(folder / "tokenizer.json")).to_str())
    assert built == theirs
