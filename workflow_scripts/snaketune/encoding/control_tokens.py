"""Finds control tokens in messages, and builds a tokenizer that reads them as ordinary text.

Typing `<|im_end|>` into a chat must not end a turn in the training data. A tokenizer cannot tell who wrote a token, so
its control tokens are renamed. Nobody can type the new names: they contain a random number of this process. The
template uses the new names, messages stay unchanged, and all ids stay the same.
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
    """A tokenizer with renamed control tokens.

    Attributes:
        tokenizer: Gives each renamed token its old id, and encodes the old names as ordinary text.
        spelling: Old name -> new name.
    """

    tokenizer: Tokenizer
    spelling: dict[str, str]


def control_tokens(tokenizer: Tokenizer, also: Iterable[str] = ()) -> list[str]:
    """Returns a tokenizer's special tokens and those in `also`, longest first."""
    added = {str(token) for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    return sorted(added | set(also), key=lambda token: (-len(token), token))


def control_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that matches any of the tokens."""
    return re.compile("|".join(map(re.escape, tokens)))


@lru_cache(maxsize=4)
def literal_spelling(names: tuple[str, ...]) -> dict[str, str]:
    """Returns the new name of each control token, the same throughout this process."""
    salt = secrets.token_hex(8)
    return {name: f"\ufdd0{salt}-{place}\ufdd1" for place, name in enumerate(names)}


def literal_tokenizer(tokenizer: ExtendedTokenizer, also: Iterable[str] = ()) -> LiteralTokenizer:
    """Returns the tokenizer with its control tokens renamed. Cached per tokenizer.json.

    Args:
        tokenizer: The extended tokenizer.
        also: Tokens to rename in addition to the special tokens: those of the template.
    """
    return _literal_tokenizer(tokenizer.sha256, tuple(also), _Source(tokenizer.tokenizer))


class _Source:
    """Holds a tokenizer. All instances are equal, so that the cache is keyed by the hash of tokenizer.json."""

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
    # The post-processor refers to the old names, trims token offsets, and has no tokens to add here.
    data["post_processor"] = None
    renamed = Tokenizer.from_str(orjson.dumps(data).decode())
    for old, new in spelling.items():
        token_id = tokenizer.token_to_id(old)
        if (
            renamed.token_to_id(new) != token_id
            or renamed.encode(new, add_special_tokens=False).ids.count(token_id) != 1
        ):
            raise UserError(
                f"the tokenizer has no other way to write {old!r}, so typed text cannot be told from the token",
                found=f"id {renamed.token_to_id(new)} instead of {token_id}",
                fix="set control_tokens to control or error",
            )
    return LiteralTokenizer(renamed, spelling)


def _rename_in_model(model: dict[str, Any], spelling: dict[str, str]) -> None:
    """Renames vocabulary entries, so that no merge or whole-word lookup can turn text into a control token."""
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
    """Returns the tokenizer without its post-processor, which may trim white space from token offsets."""
    data = orjson.loads(tokenizer.to_str())
    if data["post_processor"] is None:
        return tokenizer
    data["post_processor"] = None
    return Tokenizer.from_str(orjson.dumps(data).decode())
