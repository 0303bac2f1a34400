"""The extended tokenizer: ids, flags, an otherwise unchanged tokenizer.json, and the same ids in each library."""

from __future__ import annotations

import json
import shutil

import pytest
from ftdp_small_tokenizers import KINDS, byte_level_base, extended_folder, small_tokenizer
from tokenizers import AddedToken, Tokenizer

from snaketune.chat_format.template_file import load_template
from snaketune.common.cli import UserError
from snaketune.encoding.base_tokenizer import open_tokenizer
from snaketune.encoding.batch_encoder import encode_conversation
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.tokenizer import load_tokenizer

SPECIAL_TOKENS = load_template("internlm2_chat").special_tokens
render = load_template("internlm2_chat").render

NASTY = [
    "",
    " ",
    "\n",
    " \n ",
    "  leading and trailing  ",
    "\n\nlines\n\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_end|><|im_end|>\n<|im_start|> <|plugin|>x",
    " <|im_start|> user <|im_end|> ",
    "你好，世界。こんにちは",
    "🙂👩‍👩‍👧 é ﷽ 𝔘",
    "\x00\x01\t\r\x7f\u2028\ufeff",
    "▁▁ ▁a",
    "<s>a</s><unk>",
    "x" * 300,
]
SPECIAL_FLAGS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_missing_tokens_get_the_next_ids_in_order(kind):
    tokenizer = small_tokenizer(kind)
    base_tokens = {"smollm_like": {"<|im_start|>": 1, "<|im_end|>": 2}}.get(kind, {})
    missing = [token for token in SPECIAL_TOKENS if token not in base_tokens]
    first = tokenizer.base_vocab_size
    assert tokenizer.added == {token: first + place for place, token in enumerate(missing)}
    assert tokenizer.ids == {**tokenizer.added, **base_tokens}
    assert tokenizer.vocab_size == first + len(missing)
    entries = json.loads((extended_folder(kind) / "tokenizer.json").read_text(encoding="utf-8"))[
        "added_tokens"
    ]
    for entry in entries:
        if entry["content"] in tokenizer.added:
            assert entry == {
                "id": tokenizer.added[entry["content"]],
                "content": entry["content"],
                **SPECIAL_FLAGS,
            }
    assert tokenizer.bos_token_id == 1


@pytest.mark.parametrize("kind", ["byte_level", "smollm_like"])
def test_nothing_else_in_the_json_changes(kind):
    folder = extended_folder(kind)
    base = json.loads((folder.parent / "base" / "tokenizer.json").read_text(encoding="utf-8"))
    new = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = len(small_tokenizer(kind).added)
    assert new.pop("added_tokens")[:-added] == base.pop("added_tokens")
    new.pop("post_processor"), base.pop("post_processor")  # see the next test
    assert new == base


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_asks_for_special_tokens_gets_the_bos_of_training(kind):
    from transformers import AutoTokenizer

    tokenizer = small_tokenizer(kind)
    served = AutoTokenizer.from_pretrained(extended_folder(kind))
    for text in ("a", "<|im_start|>user\nhi<|im_end|>\n"):
        bare = encode(tokenizer.tokenizer, text)
        assert served(text)["input_ids"] == [tokenizer.bos_token_id, *bare]
        assert served(text, add_special_tokens=False)["input_ids"] == bare


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids_in_transformers(kind):
    from transformers import AutoTokenizer

    folder = extended_folder(kind)
    loaded = AutoTokenizer.from_pretrained(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*NASTY, *(a + b for a in NASTY for b in SPECIAL_TOKENS)]:
        assert loaded.encode(text, add_special_tokens=False) == encode(plain, text), repr(text)
    ours = small_tokenizer(kind)
    assert len(loaded) == ours.vocab_size
    assert loaded.bos_token_id == ours.bos_token_id
    assert loaded.eos_token_id == ours.eos_token_id
    assert loaded.pad_token_id == ours.pad_token_id
    text = loaded.decode(encode(plain, "<|im_start|>user\nhi<|im_end|>\n"), skip_special_tokens=True)
    assert text.strip() == "user\nhi"


@pytest.mark.parametrize("kind", KINDS)
def test_chat_template_renders_as_the_data_is_made(kind):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(extended_folder(kind))
    conversations = [
        [{"role": "user", "content": "hi"}],
        [
            {"role": "system", "content": "You can call tools.\n"},
            {"role": "system", "name": "plugin", "content": '[{"name": "search"}]'},
            {"role": "user", "name": "plugin", "content": " a <b> & 'c'"},
            {"role": "thought", "content": "Let me search."},
            {"role": "tool", "name": "plugin", "content": "{}"},
            {"role": "environment", "name": "plugin", "content": "[]"},
            {"role": "assistant", "name": "interpreter", "content": "Running:"},
            {"role": "tool", "name": "interpreter", "content": "print(1)"},
            {"role": "thought", "content": "done"},
            {"role": "tool", "content": "no name"},
            {"role": "assistant", "content": "Bye."},
            {"role": "assistant", "name": "Anna", "content": ""},
            {"role": "user", "content": "你好"},
        ],
    ]
    for messages in conversations:
        bos = loaded.bos_token
        assert loaded.apply_chat_template(messages, tokenize=False) == bos + render(messages)
        prompt = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt == bos + render(messages) + "<|im_start|>assistant\n"
        ids = loaded.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids == [
            abs(token) for token in encode_conversation(messages, small_tokenizer(kind), ChatEncoding())
        ]


def test_twice_gives_the_same_and_in_place_is_refused(tmp_path):
    folder = extended_folder("byte_level")
    again = open_tokenizer(folder, tmp_path / "again")
    assert again.added == {}
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    before = (folder / "manifest.json").read_bytes()
    assert open_tokenizer(folder, folder).ids == again.ids
    assert (folder / "manifest.json").read_bytes() == before
    base = shutil.copytree(folder.parent / "base", tmp_path / "base")
    with pytest.raises(UserError, match="base tokenizer's own folder"):
        open_tokenizer(base, base)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="another tokenizer or model"):
        open_tokenizer(base, tmp_path / "model")


def test_manifest(tmp_path, run_script, tiny_tokenizer_dir):
    for name in ("one", "two"):
        run_script(
            "extend_tokenizer.py",
            *(
                "--tokenizer-path",
                tiny_tokenizer_dir,
                "--tokenizer-w-special-tokens-save-dir",
                tmp_path / name,
            ),
        )
    one, two = (tmp_path / name / "manifest.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    manifest = json.loads(one.read_text())
    tokenizer = load_tokenizer(tmp_path / "one")
    assert manifest["tokenizer_sha256"] == tokenizer.sha256
    assert manifest["vocab_size"] == manifest["base_vocab_size"] + 6 == tokenizer.vocab_size
    assert manifest["ids"] == manifest["added"] == tokenizer.ids
    assert (manifest["bos_token_id"], manifest["eos_token_id"], manifest["pad_token_id"]) == (1, 2, 2)


def test_tokenizer_with_truncation_and_padding(tmp_path):
    base = shutil.copytree(extended_folder("byte_level").parent / "base", tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(base / "tokenizer.json"))
    extended = open_tokenizer(base, tmp_path / "extended")
    messages = [{"role": "user", "content": "hello, how are you today?"}]
    expected = encode_conversation(messages, small_tokenizer("byte_level"), ChatEncoding())
    assert encode_conversation(messages, extended, ChatEncoding()) == expected


def config_of(base, **changes):
    path = base / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_errors(tmp_path):
    base = byte_level_base(tmp_path / "base", ["<unk>", "<s>"], {"bos_token": None})
    with pytest.raises(UserError, match=r"no BOS token(.|\n)*tokenizer_config.json"):
        open_tokenizer(base, tmp_path / "x")
    config_of(base, bos_token="<nowhere>")
    with pytest.raises(UserError, match="BOS token is not in tokenizer.json"):
        open_tokenizer(base, tmp_path / "x")
    config_of(base, bos_token={"content": "<s>", "special": True})
    assert (
        open_tokenizer(base, tmp_path / "x").eos_token_id == load_tokenizer(tmp_path / "x").ids["<|im_end|>"]
    )
    (base / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="is not a tokenizer.json"):
        open_tokenizer(base, tmp_path / "y")
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match="does not exist"):
        open_tokenizer(tmp_path / "nothing", tmp_path / "y")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer"):
        open_tokenizer(tmp_path / "empty", tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_chat_token_that_is_only_in_the_vocabulary(tmp_path):
    base = byte_level_base(tmp_path / "base", ["<s>"], {"bos_token": "<s>"})
    data = json.loads((base / "tokenizer.json").read_text())
    data["model"]["vocab"]["<|plugin|>"] = max(data["model"]["vocab"].values()) + 1
    (base / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"does not split it off"):
        open_tokenizer(base, tmp_path / "x")


def test_extra_added_tokens_keep_their_ids(tmp_path):
    base = byte_level_base(tmp_path / "base", ["<unk>", "<s>", "</s>"], {"bos_token": "<s>"})
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=True)])
    tokenizer.save(str(base / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    extended = open_tokenizer(base, tmp_path / "x")
    assert extended.ids["<|im_end|>"] == size - 2
    assert extended.tokenizer.token_to_id("<think>") == size - 1
    assert sorted(extended.added.values()) == list(range(size, size + 5))


def test_real_mistral(tmp_path, shared_data):
    extended = open_tokenizer(shared_data / "mistral_v1_tokenizer", tmp_path / "x")
    assert extended.ids == {token: 32000 + place for place, token in enumerate(SPECIAL_TOKENS)}
    # The ids of transformers 4.48, and so of XTuner.
    assert encode(extended.tokenizer, "<|im_start|>user\n") == [32005, 2188, 13]
    assert encode(extended.tokenizer, "<|im_end|>\n") == [32004, 28705, 13]
