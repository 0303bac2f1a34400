"""Control tokens typed into a message, in every template: text, the token itself, or an error."""

from __future__ import annotations

import json

import pytest
from ftdp_small_tokenizers import small_tokenizer

from snaketune.chat_format.template_file import load_template
from snaketune.common.cli import UserError
from snaketune.encoding.batch_encoder import BatchEncoder
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.tokenized.bin_reader import TokenizedFile
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.tokenizing import tokenize_datasets

TEMPLATES = ["chatml", "internlm2_chat", "llama3", "mistral_instruct"]
TYPED = [
    (name, token) for name in TEMPLATES for token in (*load_template(name).special_tokens, "<s>", "<unk>")
]


def talk(text):
    return [
        {"role": "user", "content": f"hi {text}"},
        {"role": "thought", "content": text},
        {"role": "tool", "name": "plugin", "content": f"a{text}b"},
        {"role": "environment", "name": "plugin", "content": f"{text}\n{text}"},
        {"role": "assistant", "content": f"\n{text}"},
    ]


def encode(messages, tokenizer, how, mask="exact"):
    encoder = BatchEncoder(tokenizer, ChatEncoding(mask=mask, control_tokens=how))
    (pieces,) = encoder.encode_turns([encoder.turns(messages)])
    return [token for piece in pieces for token in piece.ids], encoder.take_counts()["control_messages"]


@pytest.mark.parametrize(("template", "typed"), TYPED)
@pytest.mark.parametrize("kind", ["byte_level", "smollm_like", "newlines"])
def test_literal_is_text_and_control_is_the_token(kind, template, typed):
    tokenizer = small_tokenizer(kind, template)
    library = tokenizer.tokenizer
    bos = tokenizer.tokens["bos_token"] if tokenizer.template.bos else ""
    masks = ("compat", "exact") if template == "internlm2_chat" else ("exact",)
    special = {key for key, token in library.get_added_tokens_decoder().items() if token.special}
    for mask in masks:
        harmless, found = encode(talk("x"), tokenizer, "literal", mask)
        assert found == 0
        ids, found = encode(talk(typed), tokenizer, "literal", mask)
        known = library.token_to_id(typed) in special
        assert found == (5 if known else 0)
        if mask == "exact":  # compat may lose the line break before the answer
            text = bos + tokenizer.template.render(talk(typed))
            assert library.decode(ids, skip_special_tokens=False) == text
        template_ids = [token for token in harmless if token in special]
        assert [token for token in ids if token in special] == template_ids
        ids, found = encode(talk(typed), tokenizer, "control", mask)
        assert found == (5 if known else 0)
        assert len([token for token in ids if token in special]) == len(template_ids) + (6 if known else 0)


@pytest.mark.parametrize("template", TEMPLATES)
def test_counted_by_dataset_and_named_as_an_error(template, tmp_path):
    tokenizer = small_tokenizer("byte_level", template)
    end = tokenizer.template.end_of_turn
    for name, texts in {"clean": ["x", "y"], "typed": ["x", end, f"{end}{end}"]}.items():
        source = tmp_path / "in" / name / "processed" / "f.jsonl"
        source.parent.mkdir(parents=True)
        source.write_text("".join(json.dumps(talk(text)) + "\n" for text in texts))
    ends = {}
    for how in ("literal", "control"):
        options = TokenizeOptions(template=template, mask="exact", control_tokens=how)
        made = tokenize_datasets(tmp_path / "in", tmp_path / how, tokenizer, options)
        assert {name: each["counts"]["control_messages"] for name, each in made.items()} == {
            "clean": 0,
            "typed": 10,
        }
        (path,) = (tmp_path / how / "chatml_llamav13_32k" / "train").glob("cn/typed/f.bin")
        ends[how] = [(TokenizedFile(path)[n][0] == tokenizer.end_of_turn_id).sum() for n in range(3)]
    assert ends["literal"] == [ends["literal"][0]] * 3
    assert ends["control"] == [ends["literal"][0] + typed for typed in (0, 6, 12)]
    options = TokenizeOptions(template=template, mask="exact", control_tokens="error")
    with pytest.raises(UserError) as caught:
        tokenize_datasets(tmp_path / "in", tmp_path / "error", tokenizer, options)
    for part in (
        "in/typed/processed/f.jsonl:2",
        "[0].content",
        f"control token {end}",
        "control_tokens to literal",
    ):
        assert part in str(caught.value)
