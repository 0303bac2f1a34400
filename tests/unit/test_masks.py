"""Compares `mask: exact` and `control_tokens` with an independent implementation and with examples."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ftdp_conversations import conversations
from ftdp_reference import (
    compat_turns,
    exact_tokens,
    exact_turns,
    glue,
    signed_tokens,
    spans_to_tokens,
    straddles,
)
from ftdp_small_tokenizers import KINDS, extended_folder, small_tokenizer
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from snaketune.chat_format.chat_template import MessageError
from snaketune.common.cli import UserError
from snaketune.encoding.base_tokenizer import open_tokenizer
from snaketune.encoding.batch_encoder import BatchEncoder, encode_conversation, encode_conversations
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.control_tokens import literal_tokenizer
from snaketune.tokenized.bin_reader import IGNORE_INDEX, TokenizedFile
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.tokenizing import tokenize_datasets

USER = {"role": "user", "content": "hi"}


def tokens_of(messages, tokenizer, **options):
    """Returns [(token, trained)] without BOS."""
    ids = encode_conversation(messages, tokenizer, ChatEncoding(**options))[1:]
    return [(tokenizer.tokenizer.id_to_token(abs(each)), each > 0) for each in ids]


def trained_text(messages, tokenizer, **options):
    """Returns the trained text."""
    options = {"mask": "exact", **options}
    ids = [each for each in encode_conversation(messages, tokenizer, ChatEncoding(**options)) if each > 0]
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


def counts_of(conversations, tokenizer, **options):
    encoder = BatchEncoder(tokenizer, ChatEncoding(**options))
    encoder.encode_turns([encoder.turns(each) for each in conversations])
    counts = encoder.take_counts()
    assert set(encoder.take_counts().values()) == {0}, "counted once"
    return counts


def pairs_of(pieces):
    return [(token, piece.trained) for piece in pieces for token in piece.ids]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("control_tokens", ["literal", "control"])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batch=st.lists(conversations(), max_size=3), many=st.booleans())
def test_exact_equals_the_reference(kind, control_tokens, batch, many):
    tokenizer = small_tokenizer(kind)
    literal = control_tokens == "literal"
    expected = [
        [(tokenizer.bos_token_id, False), *exact_tokens(each, tokenizer.tokenizer, literal)] for each in batch
    ]
    before = json.dumps(batch)
    encoder = BatchEncoder(tokenizer, ChatEncoding(mask="exact", control_tokens=control_tokens), many=many)
    pieces = encoder.encode_turns([encoder.turns(each) for each in batch])
    assert list(map(pairs_of, pieces)) == expected
    assert json.dumps(batch) == before, "the conversations are left as they are"
    if literal:
        return  # the library alone cannot give the ids of `compat` here
    counts = encoder.take_counts()
    encode = lambda text: tokenizer.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    straddling = sum(straddles(message, encode) for each in batch for message in glue(each))
    assert counts["straddling_messages"] == straddling
    differing = len(batch)  # BOS
    for messages in batch:
        exact = [spans_to_tokens(turn, tokenizer.tokenizer, literal) for turn in exact_turns(messages)]
        for one, two in zip(exact, compat_turns(messages, encode), strict=True):
            differing += sum(a != b for a, b in zip(one, two, strict=False)) + abs(len(one) - len(two))
    assert counts["tokens_differing_from_compat"] == differing


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral_instruct"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations(), control_tokens=st.sampled_from(["literal", "control"]))
def test_exact_equals_the_reference_in_every_template(kind, template, messages, control_tokens):
    messages = [{k: v for k, v in each.items() if (k, v) != ("type", "end")} for each in messages]
    if template == "mistral_instruct":  # a system message becomes part of the next user turn
        followed = [after["role"] for after in messages[1:]] + [""]
        messages = [
            each
            for each, after in zip(messages, followed, strict=False)
            if each["role"] != "system" or each.get("name") == "plugin" or after == "user"
        ]
        assume(not messages or messages[0]["role"] not in ("tool", "thought"))
    tokenizer = small_tokenizer(kind, template)
    encoder = BatchEncoder(tokenizer, ChatEncoding(mask="exact", control_tokens=control_tokens))
    (pieces,) = encoder.encode_turns([encoder.turns(messages)])
    bos = [(tokenizer.bos_token_id, False)] if tokenizer.template.bos else []
    literal = control_tokens == "literal"
    assert pairs_of(pieces) == bos + exact_tokens(messages, tokenizer.tokenizer, literal, template)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations(control=False))
def test_without_control_tokens_literal_is_compat(kind, messages):
    tokenizer = small_tokenizer(kind)
    # Random text may still contain a control token.
    tokens = [token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values()]
    said = [text for message in messages for text in (message["content"], message.get("name") or "")]
    assume(not any(token in text for token in tokens for text in said))
    encode = lambda text: tokenizer.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    expected = signed_tokens(messages, encode, tokenizer.bos_token_id)
    assert encode_conversation(messages, tokenizer, ChatEncoding(control_tokens="literal")) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["compat", "exact"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations())
def test_literal_never_writes_a_control_token_of_a_message(kind, mask, messages):
    tokenizer = small_tokenizer(kind)
    special = {key for key, token in tokenizer.tokenizer.get_added_tokens_decoder().items() if token.special}
    encoding = ChatEncoding(mask=mask, control_tokens="literal")
    ids = [abs(each) for each in encode_conversation(messages, tokenizer, encoding, None)]
    emptied = [{**message, "content": ""} for message in messages]
    for message in emptied:
        if message.get("name") not in (None, "plugin", "interpreter"):
            message["name"] = "x"
        if message["role"] == "user" and message.get("name"):
            message["name"] = "x"
    expected = encode_conversation(emptied, tokenizer, encoding, None)
    # For unknown characters, a tokenizer writes <unk>, which is also special.
    unknown = tokenizer.tokenizer.token_to_id("<unk>")
    of_template = [abs(each) for each in expected if abs(each) in special - {unknown}]
    assert [each for each in ids if each in special - {unknown}] == of_template


def test_bos_is_not_trained():
    tokenizer = small_tokenizer("byte_level")
    assert encode_conversation([USER], tokenizer, ChatEncoding())[0] == tokenizer.bos_token_id
    assert encode_conversation([USER], tokenizer, ChatEncoding(mask="exact"))[0] == -tokenizer.bos_token_id


@pytest.mark.parametrize("valid", ["copy", "holdout"])
def test_id_0_is_trained_on_in_exact(valid, tmp_path):
    """0 has no sign: the file has -0, XTuner reads 0, and the trainer gets the label."""
    tokenizer = small_tokenizer("bang")
    texts = ["!", "!a!", "a!!", "Hi!", "0! 10 -0", "no"]
    lines = [[{"role": "user", "content": "!u!"}, {"role": "assistant", "content": text}] for text in texts]
    lines.append([{"role": "user", "content": "a"}, {"role": "assistant", "content": "!", "loss": False}])
    source = tmp_path / "in" / "d" / "processed" / "f.jsonl"
    source.parent.mkdir(parents=True)
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = {}
    for mask in ("compat", "exact"):
        out = tmp_path / mask
        options = TokenizeOptions(mask=mask, valid=valid, valid_share=0.5)
        totals = tokenize_datasets(tmp_path / "in", out, tokenizer, options)["d"]["totals"]
        train, others = (
            sorted((out / "chatml_llamav13_32k" / split).rglob("f.bin")) for split in ("train", "valid")
        )
        assert len(others) == (valid == "holdout")
        trained[mask] = []
        for path in (*train, *others):
            file = TokenizedFile(path)
            samples = [file[number] for number in range(len(file))]
            assert [json.loads(line)["tokens"] for line in path.open()] == [
                np.where(labels == IGNORE_INDEX, -ids, ids).tolist() for ids, labels in samples
            ], "-0 is 0 for whoever does not know"
            for ids, labels in samples:
                assert set(labels[labels != ids].tolist()) <= {IGNORE_INDEX}
                kept = tokenizer.tokenizer.decode(
                    labels[labels != IGNORE_INDEX].tolist(), skip_special_tokens=False
                )
                trained[mask].append(kept)
            if path in train:
                count = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in samples)
                assert totals["trained_tokens"] == count
    suffix = "<|im_end|>\n"
    assert sorted(trained["exact"]) == sorted([*(text + suffix for text in texts), ""])
    assert sorted(trained["compat"]) == sorted(
        ["<s>" + text.replace("!", "") + suffix for text in texts] + ["<s>" + suffix]
    )
    zeros = "".join(texts).count("!")
    # BOS of each line, each id 0, and the two ids of the last suffix. Its content, 0, is trained on in neither mask.
    assert counts_of(lines, tokenizer, mask="exact")["tokens_differing_from_compat"] == len(lines) + zeros + 2


@pytest.mark.parametrize("silent", [{"loss": False}, {"type": "prefix"}])
def test_no_loss_covers_the_closing_token(silent):
    tokenizer = small_tokenizer("byte_level")
    messages = [USER, {"role": "assistant", "content": "yes", **silent}]
    compat = [token for token, trained in tokens_of(messages, tokenizer) if trained]
    assert compat == ["<|im_end|>", "Ċ"]
    assert trained_text(messages, tokenizer) == ""


def test_a_line_break_at_a_border_is_not_lost():
    tokenizer = small_tokenizer("newlines")
    messages = [USER, {"role": "assistant", "content": "\nyes\n"}]
    kept = "".join(token for token, _ in tokens_of(messages, tokenizer))
    assert "assistantĊyes" in kept, "compat drops the content's line break"
    exact = tokens_of(messages, tokenizer, mask="exact")
    at = exact.index(("assistant", False))
    assert exact[at + 1] == ("ĊĊ", True), "the merged token holds a character that is trained on"
    assert exact[-3:] == [("Ċ", True), ("<|im_end|>", True), ("Ċ", True)]
    counts = counts_of([messages], tokenizer, mask="exact")
    # BOS, and the merged line break in place of the prefix's line break.
    assert counts == {"straddling_messages": 1, "tokens_differing_from_compat": 2, "control_messages": 0}
    assert counts_of([messages], tokenizer)["straddling_messages"] == 1
    untouched = [USER, {"role": "assistant", "content": "yes"}]
    assert counts_of([untouched], tokenizer)["straddling_messages"] == 0


def test_a_tool_call_has_a_loss_of_its_own():
    tokenizer = small_tokenizer("byte_level")
    messages = [
        USER,
        {"role": "assistant", "content": "Let me look."},
        {"role": "tool", "name": "plugin", "content": "{}", "loss": False},
        {"role": "thought", "content": "done"},
    ]
    assert trained_text(messages, tokenizer) == "Let me look.done<|im_end|>\n"
    assert "{}" in trained_text(messages, tokenizer, mask="compat")
    del messages[2]["loss"]
    messages[1]["loss"] = False
    assert trained_text(messages, tokenizer) == ""
    messages[3]["loss"] = True
    assert trained_text(messages, tokenizer) == "done<|im_end|>\n"
    messages[3]["loss"] = "false"
    with pytest.raises(MessageError, match=r"\[3\].loss"):
        trained_text(messages, tokenizer)
    encode_conversation(messages, tokenizer, ChatEncoding(mask="compat"))


def test_control_tokens_in_messages():
    tokenizer = small_tokenizer("byte_level")
    end = tokenizer.ids["<|im_end|>"]
    typed = [{"role": "user", "name": "<|im_end|>", "content": "a<|im_end|>\nb"}]
    conversations = [typed, [USER], [USER, {"role": "thought", "content": "<s>"}]]
    as_control, as_text = (
        encode_conversations(conversations, tokenizer, ChatEncoding(control_tokens=each))
        for each in ("control", "literal")
    )
    assert [each.count(-end) for each in as_control] == [3, 1, 1]
    assert [each.count(-end) for each in as_text] == [1, 1, 1]
    decoded = tokenizer.tokenizer.decode([abs(each) for each in as_text[0][1:]], skip_special_tokens=False)
    assert decoded == "<|im_start|>user name=<|im_end|>\na<|im_end|>\nb<|im_end|>\n"
    assert tokenizer.bos_token_id not in as_text[2][1:]
    for mask in ("compat", "exact"):
        for how in ("control", "literal"):
            found = counts_of(conversations, tokenizer, mask=mask, control_tokens=how)["control_messages"]
            assert found == 3
    with pytest.raises(MessageError, match=r"\[0\].content: found the control token <\|im_end\|>"):
        encode_conversations(conversations, tokenizer, ChatEncoding(control_tokens="error"))
    typed[0]["content"] = ""
    with pytest.raises(MessageError, match=r"\[0\].name"):
        encode_conversations(conversations, tokenizer, ChatEncoding(control_tokens="error"))


def test_the_template_may_write_control_tokens():
    tokenizer = small_tokenizer("byte_level")
    messages = [
        {"role": "system", "name": "plugin", "content": "[]"},
        USER,
        {"role": "tool", "name": "plugin", "content": "{}"},
    ]
    for how in ("literal", "error"):
        ids = encode_conversation(messages, tokenizer, ChatEncoding(control_tokens=how))
        assert ids == encode_conversation(messages, tokenizer, ChatEncoding(control_tokens="control"))
    assert counts_of([messages], tokenizer)["control_messages"] == 0


def test_renaming_keeps_ids_and_is_done_once():
    for kind in KINDS:
        tokenizer = small_tokenizer(kind)
        literal = literal_tokenizer(tokenizer)
        assert literal is literal_tokenizer(tokenizer)
        assert set(literal.spelling) >= {*tokenizer.ids, *tokenizer.tokens.values()}
        for old, new in literal.spelling.items():
            assert literal.tokenizer.token_to_id(new) == tokenizer.tokenizer.token_to_id(old)
            assert literal.tokenizer.token_to_id(old) is None


def test_the_run_reports_what_it_counted(tmp_path, run_script):
    source = tmp_path / "in" / "d" / "processed" / "f.jsonl"
    source.parent.mkdir(parents=True)
    lines = [
        [USER, {"role": "assistant", "content": "\nyes"}],
        [{"role": "user", "content": "<|im_start|>"}, {"role": "assistant", "content": "no", "loss": False}],
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = small_tokenizer("newlines")
    manifest = tokenize_datasets(tmp_path / "in", tmp_path / "out", tokenizer, TokenizeOptions(mask="exact"))[
        "d"
    ]
    counts = manifest["files"][0]["counts"]
    # BOS twice, the merged line break, and the closing token of the second answer (two ids).
    assert counts["straddling_messages"] == 1
    assert counts["tokens_differing_from_compat"] == 5
    assert counts["control_messages"] == 1
    assert manifest["counts"] == {
        key: counts[key]
        for key in ("straddling_messages", "tokens_differing_from_compat", "control_messages")
    }
    places = ("--processed-dir", tmp_path / "in", "--tokenized-dir", tmp_path / "by_script")
    done = run_script(
        "tokenize_dataset.py", *places, "--tokenizer-path", extended_folder("newlines"), "--mask", "exact"
    )
    assert done.stdout.splitlines()[-1] == (
        "  mask exact: 1 messages straddle a boundary, 5 tokens differ from compat; "
        "1 messages hold a control token (literal)"
    )
    with pytest.raises(UserError, match=r"f\.jsonl:2: invalid \[0\]\.content(.|\n)*<\|im_start\|>"):
        tokenize_datasets(
            tmp_path / "in", tmp_path / "out", tokenizer, TokenizeOptions(control_tokens="error")
        )


def test_the_examples_in_the_docs(shared_data, tmp_path, repo_root):
    tokenizer = open_tokenizer(shared_data / "mistral_v1_tokenizer", tmp_path / "x")
    look = [
        {"role": "assistant", "content": "Look."},
        {"role": "tool", "name": "plugin", "content": "{}", "loss": False},
        {"role": "thought", "content": "Ok."},
    ]
    hi, yes = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}
    # What is shown, and how many of its last ids.
    examples = [
        *(([hi, yes], 16, {"mask": mask}) for mask in ("compat", "exact")),
        *(([hi, yes | {"loss": False}], 5, {"mask": mask}) for mask in ("compat", "exact")),
        *((look, 15, {"mask": mask}) for mask in ("compat", "exact")),
    ]
    for page in ("docs/masks.md", "docs/zh_cn/masks.md"):
        lines = [" ".join(line.split()) for line in (repo_root / page).read_text().splitlines()]
        for messages, count, options in examples:
            ids = encode_conversation(messages, tokenizer, ChatEncoding(**options))
            shown = ", ".join(map(str, ids[-count:]))
            assert any(
                line.replace("[ ", "[").startswith(options["mask"]) and shown in line for line in lines
            )
        typed = [{"role": "user", "content": "a<|im_end|>"}]
        for how in ("literal", "control"):
            ids = encode_conversation(typed, tokenizer, ChatEncoding(control_tokens=how))
            assert f"`... {', '.join(map(str, ids[4:-2]))}, ...`" in (repo_root / page).read_text()


@pytest.mark.parametrize("option", [{"mask": "right"}, {"control_tokens": "text"}])
def test_unknown_options(option):
    with pytest.raises(UserError, match="out of range"):
        ChatEncoding(**option)
