"""Adds the control tokens of a chat template to a base tokenizer, and saves it with the template."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from snaketune.chat_format.chat_template import ChatTemplate
from snaketune.chat_format.jinja_template import jinja_template
from snaketune.chat_format.template_file import TEMPLATE_FILE
from snaketune.common.cli import UserError
from snaketune.common.files import write_json, write_text
from snaketune.encoding.tokenizer import ExtendedTokenizer, parse_tokenizer, special_tokens, tokens_of


def extend(text: str, folder: str | os.PathLike, template: ChatTemplate) -> tuple[str, ExtendedTokenizer]:
    """Adds the missing control tokens of a chat template to a tokenizer.json.

    Existing tokens keep their ids. Missing ones become special tokens with the next ids, in the template's order, as
    XTuner 0.2.0 adds InternLM2's. Only `added_tokens` grows, and BOS is put first if the tokenizer lacks it.

    Args:
        text: The text of the base's tokenizer.json.
        folder: The folder with its tokenizer_config.json.
        template: The chat template.

    Returns:
        The text of the new tokenizer.json, and its tokenizer.
    """
    wanted = tokens_of(template)
    path = Path(folder) / "tokenizer.json"
    data, present = _read_entries(text, path)
    base_rows = max(present.values()) + 1
    tokens = special_tokens(folder, present.__contains__, template.bos)
    missing = [token for token in wanted if token not in present]
    # Start with the ids that transformers would give them, then use the ids that the library reads back.
    added = {token: base_rows + place for place, token in enumerate(missing)}
    for _ in range(2):
        new_text = _with_added_tokens(data, added) if added else text
        tokenizer = parse_tokenizer(new_text, path)
        ids = {token: tokenizer.token_to_id(token) for token in wanted}
        expected, added = added, {token: ids[token] for token in missing}
        if added == expected:
            break
    else:
        raise UserError(
            f"{folder}: the chat tokens get different ids when tokenizer.json is read again", found=ids
        )
    for token, token_id in ids.items():
        got = tokenizer.encode(token, add_special_tokens=False).ids
        if (
            token_id not in got
            or tokenizer.encode(f"a{token}b", add_special_tokens=False).ids.count(token_id) != 1
        ):
            raise UserError(
                f"{folder}: the vocabulary has {token!r}, but the tokenizer does not split it off",
                found=f"ids {got}",
                expected=f"id {token_id}",
                fix="list it under added_tokens in tokenizer.json with that id",
            )
    if template.bos and not _puts_first(tokenizer, tokens["bos_token"]):
        new_text = _with_bos_first(new_text, tokens["bos_token"], tokenizer.token_to_id(tokens["bos_token"]))
        tokenizer = parse_tokenizer(new_text, path)
    tokens.setdefault("eos_token", template.end_of_turn)
    tokens.setdefault("pad_token", tokens["eos_token"])
    return new_text, ExtendedTokenizer(
        tokenizer,
        hashlib.sha256(new_text.encode()).hexdigest(),
        tokens,
        ids,
        added,
        hashlib.sha256(text.encode()).hexdigest(),
        base_rows,
        template,
        new_text,
    )


def save_tokenizer(folder: str | os.PathLike, text: str, extended: ExtendedTokenizer) -> None:
    """Writes an extended tokenizer into a folder, the manifest last.

    transformers 4 and 5 both load it as `PreTrainedTokenizerFast` and give the ids of tokenizer.json.
    """
    folder = Path(folder)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **extended.tokens,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        "chat_template": jinja_template(extended.template),
    }
    if "add_prefix_space" in text and (orjson.loads(text).get("pre_tokenizer") or {}).get("add_prefix_space"):
        # transformers 4 turns it off unless the config sets it.
        config["add_prefix_space"] = True
    (folder / "manifest.json").unlink(missing_ok=True)
    write_text(folder / "tokenizer.json", text)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", extended.tokens)
    write_text(folder / TEMPLATE_FILE, extended.template.text)
    write_json(folder / "manifest.json", manifest(extended))


def manifest(extended: ExtendedTokenizer) -> dict[str, Any]:
    """Returns the content of an extended tokenizer's `manifest.json`."""
    return {
        "format": 1,
        "tokenizer_sha256": extended.sha256,
        "base_sha256": extended.base_sha256,
        "vocab_size": extended.vocab_size,
        "base_vocab_size": extended.base_vocab_size,
        "added": extended.added,
        "ids": extended.ids,
        "bos_token_id": extended.bos_token_id,
        "eos_token_id": extended.eos_token_id,
        "pad_token_id": extended.pad_token_id,
        "chat_template": {
            "name": extended.template.name,
            "end_of_turn": extended.template.end_of_turn,
            "sha256": extended.template.sha256,
        },
    }


def _read_entries(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns a parsed tokenizer.json, and the ids of its vocabulary and added tokens."""
    try:
        data = orjson.loads(text)
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {entry: place for place, (entry, _) in enumerate(vocabulary)}
        return data, vocabulary | {entry["content"]: entry["id"] for entry in data.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError):
        parse_tokenizer(text, path)  # raises a better error
        raise


def _with_added_tokens(data: dict[str, Any], added: dict[str, int]) -> str:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entries = [{"id": token_id, "content": token, **flags} for token, token_id in added.items()]
    grown = data | {"added_tokens": [*(data.get("added_tokens") or []), *entries]}
    return orjson.dumps(grown, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


def _puts_first(tokenizer: Tokenizer, bos: str) -> bool:
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    return tokenizer.encode("a").ids == [tokenizer.token_to_id(bos), *bare]


def _with_bos_first(text: str, bos: str, bos_id: int) -> str:
    """Makes the tokenizer start every text with BOS, as conversations do in training.

    Servers (lmdeploy, vLLM's completions) rely on the tokenizer for BOS, but not every base adds it. SmolLM2's model
    would be served without the BOS that it was trained with.
    """
    data = orjson.loads(text)
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    processor = {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, first, two],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    old = data.get("post_processor")
    if old and old["type"] == "ByteLevel":  # keeps offsets correct
        processor = {"type": "Sequence", "processors": [old, processor]}
    data["post_processor"] = processor
    return orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()
