"""Finds where a text can be split so that the ids of the parts, its "words", are the ids of the text.

Encoding takes most of the time of tokenising, and texts repeat words. The proofs here let
`snaketune.encoding.word_encoder` and `snaketune.encoding.word_lines` encode a word once and cache its ids. There are
two kinds of proof.

`MergeWords` is for Llama- and Mistral-like tokenizers. They have no pre-tokenizer and merge a whole message as one
word. But the product of a merge is the concatenation of its two sides, so a merge across a cut has a product that
contains the characters left and right of the cut. Therefore

- a character that occurs in no merge product is a word (a Chinese character, a digit);
- "▁" (the space) starts a word if no merge product has a "▁" after another character.

`SplitWords` is for byte-level BPE as in GPT-2, SmolLM2, Llama 3 and Qwen. A pre-tokenizer splits the text with a
regular expression, from left to right, and merges stay within its matches. In these expressions

- no match has white space after any other character (Llama 3: except line breaks after a non-letter);
- no match has a character that is neither a letter nor a mark after a letter.

So a match always starts at these places, whatever the context. The text before such a place matches as it would at the
end of a text: the only look-ahead, `\\s+(?!\\S)`, ends with white space.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from functools import cache
from itertools import chain
from typing import Any

import orjson
from tokenizers import Tokenizer

SPACE = "▁"
_LLAMA_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
# Llama 3's; Qwen's has single digits.
_LINE_BREAKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class WordRules(ABC):
    """How a tokenizer's texts split into words.

    Attributes:
        added: The added tokens -> id. They are not words: a text is split at them first.
        words: Pattern that finds the words of a normalized text.
        space: The normalizer's replacement for a space.
        first: Text that the normalizer prepends to a text.
    """

    words: re.Pattern[str]
    space: str
    first: str

    def __init__(self, added: dict[str, int]):
        self.added = added

    def normalize(self, text: str) -> str:
        """Normalizes a text without added tokens for `words`. Does not prepend `first`."""
        return text if self.space == " " else text.replace(" ", self.space)

    @abstractmethod
    def ids(self, word: str) -> list[int]:
        """Returns the ids of a word."""

    @abstractmethod
    def is_never_text(self, name: str) -> bool:
        """True if no text gets the id of the token `name` unless the text is split at the token."""

    @abstractmethod
    def is_single_spaced(self, text: str) -> bool:
        """True if each space of a text starts a word that does not include the next space."""

    @abstractmethod
    def ends_apart(self, text: str) -> bool:
        """True if appending text that `begins_apart` cannot change this text's ids."""

    @abstractmethod
    def begins_apart(self, text: str) -> bool:
        """True if text before it that `ends_apart` cannot change this text's ids."""


class MergeWords(WordRules):
    """Finds words by the list of merges."""

    space = first = SPACE

    def __init__(self, tokenizer: Tokenizer, added: dict[str, int], products: frozenset[str]):
        super().__init__(added)
        self._tokenize, self._products = tokenizer.model.tokenize, products
        self._merging = frozenset("".join(products)) | {SPACE}
        letters = re.escape("".join(sorted(self._merging - {SPACE})))
        words = f"{SPACE}*[{letters}]+|{SPACE}+|[^{letters}{SPACE}]" if letters else f"{SPACE}+|[^{SPACE}]"
        self.words = re.compile(words, re.DOTALL)

    def ids(self, word: str) -> list[int]:
        return [token.id for token in self._tokenize(word)]

    def is_never_text(self, name: str) -> bool:
        return len(name) > 1 and name not in self._products

    def is_single_spaced(self, text: str) -> bool:
        # Consecutive spaces are one word.
        return "  " not in text and SPACE not in text

    def ends_apart(self, text: str) -> bool:
        return text[-1] not in self._merging

    def begins_apart(self, text: str) -> bool:
        return True


class SplitWords(WordRules):
    """Finds words by the pre-tokenizer."""

    space, first = " ", ""

    def __init__(self, tokenizer: Tokenizer, added: dict[str, int], line_breaks: bool):
        super().__init__(added)
        # The same tokenizer without added tokens: in words, their names are ordinary text.
        self._tokenizer = Tokenizer(tokenizer.model)
        self._tokenizer.normalizer, self._tokenizer.pre_tokenizer = (
            tokenizer.normalizer,
            tokenizer.pre_tokenizer,
        )
        letters, others = letters_and_others()
        # A word continues at marks, at newer Unicode characters, and at white space that only Python knows.
        goes_on = rf"[^{letters}{others}\s]|[\x1c-\x1f]" + rf"|(?<![{letters}])[\r\n]" * line_breaks
        self.words = re.compile(
            rf"(?!\Z)\s*[^{letters}\s]*[{letters}]*(?:(?:{goes_on})\s*[^{letters}\s]*[{letters}]*)*"
        )

    def ids(self, word: str) -> list[int]:
        return self._tokenizer.encode_batch_fast([word], add_special_tokens=False)[0].ids

    def is_never_text(self, name: str) -> bool:
        return len(self.words.findall(name)) > 1

    def is_single_spaced(self, text: str) -> bool:
        # White space other than " " is not printable.
        return "  " not in text and text.isprintable()

    def ends_apart(self, text: str) -> bool:
        # The last of several line breaks may or may not join the text after it.
        return text[-1] == "\n" and not text[-2:-1].isspace()

    def begins_apart(self, text: str) -> bool:
        return not text[:1].isspace()


@cache
def letters_and_others() -> tuple[str, str]:
    """Returns two character classes: letters, and characters that are not letters, marks or white space.

    Includes only characters with the same class in Unicode 3.2 and today, so that all library versions agree, and only
    characters that NFC does not change.
    """
    ranges: dict[str, list[list[int]]] = {"letter": [], "other": [], "": []}
    for code in range(0x10000):
        kind = _kind(chr(code))
        if ranges[kind] and ranges[kind][-1][1] == code - 1:
            ranges[kind][-1][1] = code
        else:
            ranges[kind].append([code, code])
    letters, others = (
        "".join(rf"\u{first:04x}-\u{last:04x}" for first, last in ranges[kind])
        for kind in ("letter", "other")
    )
    return letters, others


def _kind(character: str) -> str:
    if unicodedata.normalize("NFC", character) != character:
        return ""
    now, before = unicodedata.category(character)[0], unicodedata.ucd_3_2_0.category(character)[0]
    if now == before == "L":
        return "letter"
    return "other" if now in "NPS" and before in "NPS" else ""


def word_rules(tokenizer: Tokenizer, text: str) -> WordRules | None:
    """Returns the rules of a tokenizer, or None if encoding word by word would not be exact.

    Args:
        tokenizer: The tokenizer.
        text: The text of its tokenizer.json.
    """
    data: dict[str, Any] = orjson.loads(text)
    added, model = data.get("added_tokens") or [], data["model"]
    flags = ("normalized", "lstrip", "rstrip", "single_word")
    if (
        model.get("type") != "BPE"
        or model.get("dropout")
        or not added
        or any(not entry["content"] or any(entry[flag] for flag in flags) for entry in added)
    ):
        return None
    ids = {entry["content"]: entry["id"] for entry in added}
    if data.get("pre_tokenizer") is None and data.get("normalizer") == _LLAMA_NORMALIZER:
        products = _products(model)
        if products is None or any(SPACE in token for token in ids):
            return None
        return MergeWords(tokenizer, ids, products)
    line_breaks = _has_line_breaks(data.get("pre_tokenizer"))
    if line_breaks is None or data.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    return SplitWords(tokenizer, ids, line_breaks)


def _products(model: dict[str, Any]) -> frozenset[str] | None:
    """Returns the products of all merges, or None if a merge could cross a cut of `MergeWords`."""
    of_bytes = {f"<0x{byte:02X}>" for byte in range(256)}
    suits = (
        not any(
            model.get(key) for key in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
        )
        # With tokens for "▁" and every byte nothing is unknown, so no unknown tokens are fused across a cut.
        and model.get("byte_fallback")
        and of_bytes <= model["vocab"].keys()
        and SPACE in model["vocab"]
    )
    if not suits:
        return None
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    # A merge of a byte token does not reveal the character.
    if not of_bytes.isdisjoint(chain.from_iterable(pairs)):
        return None
    products = frozenset([left + right for left, right in pairs])
    # No text has a " ": the normalizer replaces it with "▁".
    if re.search(f"[^{SPACE} ]{SPACE}", " ".join(products)):
        return None
    return products


def _has_line_breaks(pre_tokenizer: dict[str, Any] | None) -> bool | None:
    """True if matches may end with line breaks, False if not, None if the expression is unknown."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *others, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last.get("use_regex", True):
        return False if all(step["type"] == "Digits" for step in others) else None
    for digits in ("", "{1,3}"):
        pattern = {"Regex": _LINE_BREAKS.replace("{1,3}", digits)}
        if others == [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]:
            return True
    return None
