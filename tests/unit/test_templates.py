"""Chat templates: validation of template files, the shipped templates, and Jinja with training's ids."""

from __future__ import annotations

import copy
import functools
import json
import re

import pytest
import yaml
from ftdp_conversations import conversations
from ftdp_reference import exact_turns
from ftdp_small_tokenizers import KINDS, extended_folder, small_tokenizer
from hypothesis import HealthCheck, assume, given, settings

from snaketune.chat_format.chat_template import MessageError
from snaketune.chat_format.jinja_template import jinja_template
from snaketune.chat_format.template_file import load_template, parse_template, shipped_templates
from snaketune.common.cli import UserError
from snaketune.encoding.base_tokenizer import open_tokenizer
from snaketune.encoding.batch_encoder import BatchEncoder, encode_conversation, signed_ids
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.tokenizer import load_tokenizer

TEMPLATES = ["chatml", "internlm2_chat", "llama3", "mistral_instruct"]
# XTuner has masks only for its one template.
MASKED = [("internlm2_chat", "compat"), *((name, "exact") for name in TEMPLATES)]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "system", "name": "plugin", "content": '[{"name": "f"}]'},
    {"role": "user", "content": "hi"},
    {"role": "thought", "content": "Look."},
    {"role": "tool", "name": "plugin", "content": '{"name": "f"}'},
    {"role": "environment", "name": "plugin", "content": "[1]"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "Bye."},
]


@functools.cache
def transformers_tokenizer(kind, template):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(extended_folder(kind, template))


def test_shipped():
    assert shipped_templates() == TEMPLATES
    for name in TEMPLATES:
        assert load_template(name).name == name
    assert load_template("internlm2_chat").name == "internlm2_chat"
    with pytest.raises(UserError, match=r"no chat template 'nonsense'(.|\n)*chatml, internlm2_chat"):
        load_template("nonsense")


def test_what_they_write():
    """The shipped templates match the formats as their makers document them."""
    assert load_template("chatml").render([TALK[0], *TALK[2:]]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        '<|im_start|>assistant\nLook.\n<tool_call>\n{"name": "f"}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n[1]\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nOne.<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>\n"
    )
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert load_template("llama3").render([TALK[0], *TALK[2:]]) == (
        head.format("system") + "Be brief.<|eot_id|>" + head.format("user") + "hi<|eot_id|>"
        f'{head.format("assistant")}Look.<|python_tag|>{{"name": "f"}}<|eot_id|>'
        f"{head.format('ipython')}[1]<|eot_id|>{head.format('assistant')}One.<|eot_id|>"
        f"{head.format('user')}bye<|eot_id|>{head.format('assistant')}Bye.<|eot_id|>"
    )
    assert load_template("mistral_instruct").render(TALK) == (
        '[AVAILABLE_TOOLS][{"name": "f"}][/AVAILABLE_TOOLS][INST]Be brief.\n\nhi[/INST]'
        'Look.[TOOL_CALLS]{"name": "f"}</s>[TOOL_RESULTS][1][/TOOL_RESULTS]One.</s>[INST]bye[/INST]Bye.</s>'
    )
    assert load_template("internlm2_chat").render(TALK) == "".join(
        text for turn in exact_turns(TALK) for text, _, _ in turn
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations())
def test_jinja_gives_the_ids_of_training(kind, template, messages):
    tokenizer = small_tokenizer(kind, template)
    library = transformers_tokenizer(kind, template)
    # Jinja does not depend on what is trained on, and only InternLM2's template has types.
    messages = [
        {key: message[key] for key in ("role", "name", "content") if key in message} for message in messages
    ]
    try:
        text = tokenizer.template.render(messages)
    except MessageError as error:
        assert template == "mistral_instruct" and "next user turn" in str(error)
        messages = [message for message in messages if message["role"] != "system"]
        assume(not messages or messages[0]["role"] not in ("tool", "thought"))
        text = tokenizer.template.render(messages)
    assume(messages)  # transformers refuses an empty conversation
    bos = tokenizer.tokens["bos_token"] if tokenizer.template.bos else ""
    assert library.apply_chat_template(messages, tokenize=False) == bos + text
    prompt = library.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == bos + text + tokenizer.template.generation_prompt
    encoder = BatchEncoder(tokenizer, ChatEncoding(mask="exact", control_tokens="control"))
    pieces = encoder.encode_turns([encoder.turns(messages)])[0]
    ids = [abs(each) for each in signed_ids(pieces)]
    assert library.apply_chat_template(messages, tokenize=True, return_dict=False) == ids
    if template == "internlm2_chat" and not encoder.take_counts()["straddling_messages"]:
        compat = encode_conversation(messages, tokenizer, ChatEncoding(control_tokens="control"), None)
        assert [abs(each) for each in compat] == ids


@pytest.mark.parametrize(("template", "mask"), MASKED)
@pytest.mark.slow
def test_jinja_gives_the_ids_of_training_on_real_data(template, mask, shared_data, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = open_tokenizer(shared_data / "mistral_v1_tokenizer", tmp_path / "x", template=template)
    library = AutoTokenizer.from_pretrained(tmp_path / "x")
    encoder = BatchEncoder(tokenizer, ChatEncoding(mask=mask), many=True)
    batch = [
        json.loads(line)
        for source in sorted((shared_data / "ftdp").rglob("*.jsonl"))
        for line in source.read_text(encoding="utf-8").splitlines()
    ]
    assert len(batch) == 600
    pieces = encoder.encode_turns([encoder.turns(each) for each in batch])
    assert encoder.take_counts()["control_messages"] == 0
    for messages, each in zip(batch, pieces, strict=True):
        expected = library.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert [abs(token) for token in signed_ids(each)] == expected


@pytest.mark.parametrize(("template", "mask"), MASKED)
def test_what_is_trained(template, mask):
    tokenizer = small_tokenizer("byte_level", template)
    ids = encode_conversation(TALK, tokenizer, ChatEncoding(mask=mask))[tokenizer.template.bos :]
    trained = tokenizer.tokenizer.decode([each for each in ids if each > 0], skip_special_tokens=False)
    assert (
        trained
        == {
            "internlm2_chat": 'Look.<|action_start|><|plugin|>\n{"name": "f"}<|action_end|>\n<|im_end|>\n'
            "One.<|im_end|>\nBye.<|im_end|>\n",
            "chatml": 'Look.\n<tool_call>\n{"name": "f"}\n</tool_call><|im_end|>\nOne.<|im_end|>\nBye.<|im_end|>\n',
            "llama3": 'Look.<|python_tag|>{"name": "f"}<|eot_id|>One.<|eot_id|>Bye.<|eot_id|>',
            "mistral_instruct": 'Look.[TOOL_CALLS]{"name": "f"}</s>One.</s>Bye.</s>',
        }[template]
    )


def test_the_template_is_saved_with_the_tokenizer():
    for name in TEMPLATES:
        tokenizer = load_tokenizer(extended_folder("newlines", name))
        assert tokenizer.template == load_template(name)
        assert tokenizer.end_of_turn_id == tokenizer.ids[tokenizer.template.end_of_turn]
        config = json.loads((extended_folder("newlines", name) / "tokenizer_config.json").read_text())
        assert config["chat_template"] == jinja_template(tokenizer.template)
        assert list(tokenizer.template.roles) == list(load_template(name).roles)
    with pytest.raises(UserError, match=r"lacks tokens(.|\n)*<\|eot_id\|>(.|\n)*--template llama3"):
        BatchEncoder(small_tokenizer("byte_level"), ChatEncoding(template="llama3", mask="exact"))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_gets_the_tokens_of_its_template(kind, template):
    """Adds missing tokens in the file's order. Each is one token in any context, and nothing else changes."""
    tokenizer = small_tokenizer(kind, template)
    base = json.loads((extended_folder(kind, template) / "tokenizer.json").read_text())
    path = extended_folder(kind, template).parent / "base" / "tokenizer.json"
    had = set(json.loads(path.read_text())["model"]["vocab"]) if path.is_file() else {"<unk>", "<s>", "</s>"}
    wanted = {
        "chatml": "<|im_start|> <|im_end|>",
        "internlm2_chat": "<|plugin|> <|interpreter|> <|action_end|> <|action_start|> <|im_end|> <|im_start|>",
        "llama3": "<|start_header_id|> <|end_header_id|> <|eot_id|> <|python_tag|>",
        "mistral_instruct": "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
        "[/TOOL_RESULTS] </s>",
    }[template].split()
    assert list(tokenizer.ids) == wanted
    missing = [token for token in wanted if token not in had]
    first = tokenizer.base_vocab_size
    assert tokenizer.added == {token: first + place for place, token in enumerate(missing)}
    assert [each["content"] for each in base["added_tokens"] if each["id"] >= first] == missing
    for token, token_id in tokenizer.ids.items():
        for text in (token, f"a{token}b", f" {token}\n"):
            assert tokenizer.tokenizer.encode(text, add_special_tokens=False).ids.count(token_id) == 1


def test_a_saved_template_that_was_changed_is_refused(tmp_path):
    open_tokenizer(extended_folder("newlines").parent / "base", tmp_path / "x", template="chatml")
    path = tmp_path / "x" / "chat_template.yaml"
    text = path.read_text()
    path.write_text(text.replace("<|im_start|>user", "<|im_start|>human"))
    with pytest.raises(UserError, match=r"chat_template\.yaml is not the chat template(.|\n)*was changed"):
        load_tokenizer(tmp_path / "x")
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "x")
    path.write_text(text)
    assert load_tokenizer(tmp_path / "x").template == load_template("chatml")


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral_instruct"])
def test_compat_is_for_internlm2_alone(template, tmp_path, run_script):
    tokenizer = small_tokenizer("byte_level", template)
    with pytest.raises(UserError, match=rf"template {template} with mask compat(.|\n)*tokenize\.mask: exact"):
        BatchEncoder(tokenizer, ChatEncoding())
    folder = extended_folder("byte_level", template)
    places = ("--processed-dir", tmp_path, "--tokenized-dir", tmp_path / "out", "--tokenizer-path", folder)
    source = tmp_path / "d" / "processed" / "f.jsonl"
    source.parent.mkdir(parents=True)
    source.write_text(json.dumps(TALK) + "\n")
    done = run_script("tokenize_dataset.py", *places, "--mask", "exact", check=False)
    assert "the tokenizer was extended for another chat template" in done.stderr and template in done.stderr
    done = run_script("tokenize_dataset.py", *places, "--template", template, check=False)
    assert done.returncode == 2 and "--mask exact" in done.stderr and "Traceback" not in done.stderr


def test_a_template_without_bos_needs_none(tmp_path):
    base = extended_folder("byte_level").parent / "base"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no BOS token"):
        open_tokenizer(tmp_path / "base", tmp_path / "x")
    tokenizer = open_tokenizer(tmp_path / "base", tmp_path / "x", template="chatml")
    assert tokenizer.bos_token_id is None
    assert load_tokenizer(tmp_path / "x").template.bos is False
    first = encode_conversation(TALK, tokenizer, ChatEncoding(mask="exact"))[0]
    assert first == -tokenizer.ids["<|im_start|>"]


def test_a_message_that_opens_another_roles_turn():
    template = load_template("mistral_instruct")
    system, user = TALK[0], TALK[2]
    twice = template.turns([system, system, user])
    assert [turn.content for turn in twice] == ["Be brief.\n\nBe brief.\n\nhi"]
    for messages, index in (([system], 1), ([system, TALK[6]], 1), ([user, system, TALK[3], user], 2)):
        with pytest.raises(MessageError, match=rf"\[{index}\].role.*expected a user message"):
            template.turns(messages)


@pytest.mark.parametrize("page", ["docs/templates.md", "docs/zh_cn/templates.md"])
def test_the_example_in_the_docs(page, repo_root):
    (text,) = re.findall(r"```yaml\n# gemma\.yaml\n(.*?)^```$", (repo_root / page).read_text(), re.S | re.M)
    assert parse_template(text, "gemma", page).render(TALK[:1] + TALK[2:6]) == (
        "<start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n"
        '<start_of_turn>model\nLook.```tool_code\n{"name": "f"}\n```<end_of_turn>\n'
        "<start_of_turn>user\n```tool_output\n[1]\n```<end_of_turn>\n"
    )


CUSTOM = {
    "special_tokens": ["<turn>", "</turn>"],
    "end_of_turn": "</turn>",
    "names": {"calc": "<turn>calc"},
    "roles": {
        "person": {"begin": "<turn>person: ", "named_begin": "<turn>{name}: ", "end": "</turn>"},
        "assistant": {"begin": "<turn>assistant: ", "end": "</turn>", "trained": True},
        "aside": {"part_of": "assistant", "begin": "(", "end": ")"},
    },
}


def test_a_template_of_ones_own(tmp_path, run_script, tiny_tokenizer_dir):
    """A YAML file is enough, without Python: extend, tokenise, load again."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(CUSTOM))
    save = ("--tokenizer-w-special-tokens-save-dir", tmp_path / "tokenizer")
    run_script("extend_tokenizer.py", "--tokenizer-path", tiny_tokenizer_dir, *save, "--template", path)
    source = tmp_path / "in" / "d" / "processed" / "f.jsonl"
    source.parent.mkdir(parents=True)
    talk = [
        {"role": "person", "name": "Ann", "content": "1+1?"},
        {"role": "aside", "content": "easy"},
        {"role": "assistant", "content": "2"},
    ]
    source.write_text(json.dumps(talk) + "\n")
    places = ("--processed-dir", tmp_path / "in", "--tokenized-dir", tmp_path / "out")
    run_script(
        "tokenize_dataset.py",
        *(*places, "--tokenizer-path", tmp_path / "tokenizer", "--template", path, "--mask", "exact"),
    )
    line = next((tmp_path / "out").rglob("f.bin")).read_text()
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.template.name == "mine"
    ids = json.loads(line)["tokens"]
    decode = functools.partial(tokenizer.tokenizer.decode, skip_special_tokens=False)
    assert decode([abs(each) for each in ids]) == (
        "<s><turn>Ann: 1+1?</turn><turn>assistant: (easy)</turn><turn>assistant: 2</turn>"
    )
    # The space before the answer counts as part of it if the two are one token.
    assert decode([each for each in ids if each > 0]) == "(easy)</turn>2</turn>"


def changed(path, value):
    description = copy.deepcopy(CUSTOM)
    *parents, last = path
    place = description
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return description


BAD = {
    "not a mapping": (["roles"], "file"),
    "unknown key": (changed(["rolls"], {}), "rolls"),
    "no roles": (changed(["roles"], None), "roles"),
    "no tokens": (changed(["special_tokens"], None), "special_tokens"),
    "no end": (changed(["end_of_turn"], None), "end_of_turn"),
    "empty end": (changed(["end_of_turn"], ""), "end_of_turn"),
    "token twice": (changed(["special_tokens"], ["a", "a"]), "special_tokens[1]"),
    "token is a number": (changed(["special_tokens"], [3]), "special_tokens[0]"),
    "bos is a text": (changed(["bos"], "yes"), "bos"),
    "name is a list": (changed(["names", "calc"], []), "names.calc"),
    "no assistant": (changed(["roles", "assistant"], None), "roles"),
    "nothing trained": (changed(["roles", "assistant", "trained"], False), "roles"),
    "unknown role key": (changed(["roles", "person", "start"], "x"), "roles.person.start"),
    "begin is a number": (changed(["roles", "person", "begin"], 3), "roles.person.begin"),
    "role is a text": (changed(["roles", "person"], "x"), "roles.person"),
    "odd role name": (changed(["roles", "a b"], {}), "roles.a b"),
    "name nowhere": (changed(["roles", "person", "named_begin"], "x"), "roles.person.named_begin"),
    "name twice": (changed(["roles", "person", "named_begin"], "{name}{name}"), "roles.person.named_begin"),
    "part of nothing": (changed(["roles", "aside", "part_of"], "bot"), "roles.aside.part_of"),
    "part of itself": (changed(["roles", "aside", "part_of"], "aside"), "roles.aside.part_of"),
    "part that is trained": (changed(["roles", "aside", "trained"], True), "roles.aside.trained"),
    "opens nothing": (changed(["roles", "person", "opens"], "aside"), "roles.person.opens"),
    "type is a text": (changed(["roles", "person", "types"], {"x": "no"}), "roles.person.types.x"),
    "type trained": (changed(["roles", "person", "types"], {"x": True}), "roles.person.types.x"),
    "by_name is a text": (changed(["roles", "person", "by_name"], {"x": "no"}), "roles.person.by_name.x"),
    "by_name key": (changed(["roles", "person", "by_name"], {"x": {"a": "b"}}), "roles.person.by_name.x.a"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_descriptions(case, tmp_path):
    description, key = BAD[case]
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(description))
    with pytest.raises(UserError) as caught:
        load_template(path)
    assert str(caught.value).startswith(f"{path}: invalid {key}\n"), caught.value
    for part in ("found:", "expected:", "to fix:"):
        assert part in str(caught.value)


def test_files_that_are_no_yaml(tmp_path):
    (tmp_path / "bad.yaml").write_text("roles: [")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        load_template(tmp_path / "bad.yaml")
    assert parse_template(yaml.safe_dump(CUSTOM), "mine", "here").generation_prompt == "<turn>assistant: "
