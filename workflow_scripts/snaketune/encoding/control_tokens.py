"""Control tokens that stand inside a message, and a tokenizer that reads them there as ordinary text.

Whoever types `<|im_end|>` into a chat must not end a turn of the training data with it. A tokenizer cannot tell who
wrote a token, so it gets other names for its control tokens, names that nobody can type: they hold a random number of
this process. The template is written with the new names, the messages are left alone, and all ids stay what they were.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
from tokenizers import Tokenizer

from snaketune.common.cli import UserError
from snaketune.encoding.tokenizer import ExtendedTokenizer


class LiteralTokenizer(NamedTuple):
    """A tokenizer whose control tokens have other names.

    Attributes:
        tokenizer: Gives each renamed token its old id, and the old names the ids of ordinary text.
        spelling: Old name -> new name.
    """

    tokenizer: Tokenizer
    spelling: dict[str, str]


def control_tokens(tokenizer: Tokenizer, also: Iterable[str] = ()) -> list[str]:
    """Returns a tokenizer's special tokens and those of a template, the longest first."""
    added = {str(token) for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    return sorted(added | set(also), key=lambda token: (-len(token), token))


def control_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that finds any of the tokens."""
    return re.compile("|".join(map(re.escape, tokens)))


@lru_cache(maxsize=4)
def literal_spelling(names: tuple[str, ...]) -> dict[str, str]:
    """Returns the new name of each control token, the same all through this process."""
    salt = secrets.token_hex(8)
    return {name: f"\ufdd0{salt}-{place}\ufdd1" for place, name in enumerate(names)}


def literal_tokenizer(tokenizer: ExtendedTokenizer, also: Iterable[str] = ()) -> LiteralTokenizer:
    """Returns the tokenizer with its control tokens renamed, made once for each tokenizer.json.

    Args:
        tokenizer: The extended tokenizer.
        also: Tokens to rename besides its special ones: those of the template.
    """
    return _literal_tokenizer(tokenizer.sha256, tuple(also), _Source(tokenizer.tokenizer))


class _Source:
    """Equal to every other one, so that the hash of tokenizer.json alone decides what is remembered."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=4)
def _literal_tokenizer(sha256: str, also: tuple[str, ...], source: _Source) -> LiteralTokenizer:
    tokenizer = source.tokenizer
    spelling = literal_spelling(tuple(control_tokens(tokenizer, also)))
    data: dict[str, Any] = orjson.loads(tokenizer.to_str())
    _rename_in_model(data["model"], spelling)
    for entry in data["added_tokens"]:
        if entry["content"] in spelling:
            entry.update(content=spelling[entry["content"]], normalized=False)
    # It names special tokens, adds none here, and trims the offsets of tokens.
    data["post_processor"] = None
    renamed = Tokenizer.from_str(orjson.dumps(data).decode())
    for old, new in spelling.items():
        token_id = tokenizer.token_to_id(old)
        if (
            renamed.token_to_id(new) != token_id
            or renamed.encode(new, add_special_tokens=False).ids.count(token_id) != 1
        ):
            raise UserError(
                f"the tokenizer has no other way to write {old!r}, so it cannot be told from typed text",
                found=f"id {renamed.token_to_id(new)} instead of {token_id}",
                fix="set control_tokens to control or error",
            )
    return LiteralTokenizer(renamed, spelling)


def _rename_in_model(model: dict[str, Any], spelling: dict[str, str]) -> None:
    """Renames the vocabulary's entries too: no merge or whole-word look-up may make a control token of text."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {spelling.get(entry, entry): token_id for entry, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[spelling.get(entry, entry), score] for entry, score in vocabulary]
    if model.get("unk_token") in spelling:
        model["unk_token"] = spelling[model["unk_token"]]
    if model.get("merges") and any(name in vocabulary for name in spelling):
        pairs = (
            tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
            for merge in model["merges"]
        )
        model["merges"] = [
            pair for pair in pairs if not {pair[0], pair[1], pair[0] + pair[1]} & spelling.keys()
        ]


def without_trimming(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer without its post-processor, which may cut white space off the offsets of tokens."""
    data = orjson.loads(tokenizer.to_str())
    if data["post_processor"] is None:
        return tokenizer
    data["post_processor"] = None
    return Tokenizer.from_str(orjson.dumps(data).decode())
