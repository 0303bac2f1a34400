"""Where a text may be cut so that the ids of its pieces, its "words", are the ids of the text.

Encoding is most of the time of tokenising, and texts repeat their words. What is proved here lets `snaketune.encoding.word_encoder`
and `snaketune.encoding.word_lines` encode a word once and keep its ids. There are two kinds of proof.

`MergeWords` is for Llama- and Mistral-like tokenizers. They have no pre-tokenizer and merge a whole message as one word,
but what a merge makes is the text of its two sides, so it holds the characters left and right of a boundary that it
crosses. Therefore

- a character that is in nothing that merges make is a word of its own (a Chinese character, a digit);
- "▁" (the space) begins a word, where no merge makes something with a "▁" behind another character.

`SplitWords` is for byte-level BPE as in GPT-2, SmolLM2, Llama 3 and Qwen. A pre-tokenizer cuts the text with a regular
expression, from left to right, and merges stay within its matches. In these expressions

- no match has white space behind anything else (Llama 3's: but for line breaks behind what is no letter);
- no match has a character that is neither letter nor mark behind a letter.

So a match always begins at such a place, whatever stands around it, and what is left of it matches as at the text's
end: the only look-ahead, `\\s+(?!\\S)`, ends with white space.
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
    """How a tokenizer's texts fall into words.

    Attributes:
        added: The added tokens' ids. They are no words: a text is cut at them first.
        words: Finds the words of a normalized text.
        space: What the normalizer makes of a space.
        first: What the normalizer puts in front of a text.
    """

    words: re.Pattern[str]
    space: str
    first: str

    def __init__(self, added: dict[str, int]):
        self.added = added

    def normalize(self, text: str) -> str:
        """Returns a text without added tokens as `words` takes it, without `first`."""
        return text if self.space == " " else text.replace(" ", self.space)

    @abstractmethod
    def ids(self, word: str) -> list[int]:
        """Returns the ids of a word."""

    @abstractmethod
    def is_never_text(self, name: str) -> bool:
        """Can no text have the id of a token of this name, unless it is cut at the token?"""

    @abstractmethod
    def is_single_spaced(self, text: str) -> bool:
        """Does each space of a text begin a word, that of the next one not included?"""

    @abstractmethod
    def ends_apart(self, text: str) -> bool:
        """Do the ids of a text stay what they are if something is appended that `begins_apart`?"""

    @abstractmethod
    def begins_apart(self, text: str) -> bool:
        """Do the ids of a text stay what they are behind one that `ends_apart`?"""


class MergeWords(WordRules):
    """Words by the list of merges."""

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
        # Spaces that follow each other are one word.
        return "  " not in text and SPACE not in text

    def ends_apart(self, text: str) -> bool:
        return text[-1] not in self._merging

    def begins_apart(self, text: str) -> bool:
        return True


class SplitWords(WordRules):
    """Words by the pre-tokenizer."""

    space, first = " ", ""

    def __init__(self, tokenizer: Tokenizer, added: dict[str, int], line_breaks: bool):
        super().__init__(added)
        # The same without added tokens: as words their names are text.
        self._tokenizer = Tokenizer(tokenizer.model)
        self._tokenizer.normalizer, self._tokenizer.pre_tokenizer = (
            tokenizer.normalizer,
            tokenizer.pre_tokenizer,
        )
        letters, others = letters_and_others()
        # Where a word goes on: at marks, at what is new in Unicode, at white space for Python alone.
        goes_on = rf"[^{letters}{others}\s]|[\x1c-\x1f]" + rf"|(?<![{letters}])[\r\n]" * line_breaks
        self.words = re.compile(
            rf"(?!\Z)\s*[^{letters}\s]*[{letters}]*(?:(?:{goes_on})\s*[^{letters}\s]*[{letters}]*)*"
        )

    def ids(self, word: str) -> list[int]:
        return self._tokenizer.encode_batch_fast([word], add_special_tokens=False)[0].ids

    def is_never_text(self, name: str) -> bool:
        return len(self.words.findall(name)) > 1

    def is_single_spaced(self, text: str) -> bool:
        # All white space but " " is not printable.
        return "  " not in text and text.isprintable()

    def ends_apart(self, text: str) -> bool:
        # Of several line breaks the last may be taken together with what follows, or not.
        return text[-1] == "\n" and not text[-2:-1].isspace()

    def begins_apart(self, text: str) -> bool:
        return not text[:1].isspace()


@cache
def letters_and_others() -> tuple[str, str]:
    """Returns two character classes: letters, and what is neither letter nor mark nor white space.

    Characters that were so in Unicode 3.2 and are today, so that libraries of all versions agree on them, and that
    NFC leaves alone.
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
    """Returns the rules of a tokenizer, or None where encoding word by word would not be exact.

    Args:
        tokenizer: The tokenizer.
        text: Its tokenizer.json.
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
    """Returns what merges make, or None where one could cross a boundary of `MergeWords`."""
    of_bytes = {f"<0x{byte:02X}>" for byte in range(256)}
    suits = (
        not any(
            model.get(key) for key in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
        )
        # With a token for "▁" and for every byte nothing is unknown, so no run of unknowns is fused over a boundary.
        and model.get("byte_fallback")
        and of_bytes <= model["vocab"].keys()
        and SPACE in model["vocab"]
    )
    if not suits:
        return None
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    # A merge of the token of a byte does not say which character it stands for.
    if not of_bytes.isdisjoint(chain.from_iterable(pairs)):
        return None
    products = frozenset([left + right for left, right in pairs])
    # No text has a " ": the normalizer makes it "▁".
    if re.search(f"[^{SPACE} ]{SPACE}", " ".join(products)):
        return None
    return products


def _has_line_breaks(pre_tokenizer: dict[str, Any] | None) -> bool | None:
    """Returns whether matches may end with line breaks; None where the expression is not one of those known."""
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
