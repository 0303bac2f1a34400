"""The hot path: writes lines of a `.bin` file directly from the turns' text.

Works for tokenizers with `snaketune.encoding.word_rules`. Caches how the file spells the ids of each word: `12, 345, `
if it is trained on and `-12, -345, ` if not. A line is one join of these bytes. No list of ids is built, and only new
words go through the tokenizers library. If no merge and no added token can cross the edges between prefix, content and
suffix, the mask follows from the text alone. Other conversations are left to `snaketune.encoding.batch_encoder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from snaketune.chat_format.chat_template import Turn
from snaketune.encoding.exact_mask import one_answer
from snaketune.encoding.word_encoder import splitter
from snaketune.encoding.word_rules import WordRules

# About 2 MB per table; each process has four. With larger tables, memory would grow with the file.
_MAX_ENTRIES = 1 << 13
_MAX_CHARACTERS = 24
# Longer texts are processed word by word, without a list: they may have millions of words.
_LONG = 1 << 16
_MAX_BOUNDARIES = 4096


class _Spelled(dict[str, bytes]):
    """Text -> the bytes of its ids in a `.bin` file, each followed by ", ". Caches short texts.

    Args:
        rules: The tokenizer's rules.
        form: Format of an id.
        zero: Bytes of id 0, followed by ", " (see `snaketune.encoding.signed_ids`).
        prefix: Text to put before each text.
        words: Table for the words of longer texts; by default this one.
    """

    def __init__(
        self, rules: WordRules, form: bytes, zero: bytes, prefix: str = "", words: _Spelled | None = None
    ):
        super().__init__()
        self._rules, self._form, self._zero, self._prefix = rules, form, zero, prefix
        self._words = self if words is None else words

    def __missing__(self, text: str) -> bytes:
        whole = self._prefix + text
        if len(whole) > _LONG:
            return self.spell_long(whole)
        words = self._rules.words.findall(whole)
        if len(words) == 1:
            spelled = self.spell(self._rules.ids(whole))
        else:
            spelled = b"".join(map(self._words.__getitem__, words))
        if len(text) <= _MAX_CHARACTERS:
            if len(self) >= _MAX_ENTRIES:
                self.clear()
            self[text] = spelled
        return spelled

    def spell(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._form % token if token else self._zero for token in ids])

    def spell_long(self, whole: str) -> bytes:
        """Spells a text of many words with little memory."""
        words = self._words
        if len(whole) <= _LONG:
            return b"".join(map(words.__getitem__, self._rules.words.findall(whole)))
        return b"".join([words._word(match[0]) for match in self._rules.words.finditer(whole)])

    def _word(self, word: str) -> bytes:
        """Looks up a single word, which may be long."""
        if len(word) <= _LONG:
            return self[word]
        return self.spell(self._rules.ids(word))


class _Sign:
    """Spells texts that are all trained on, or all not.

    `_words` maps words to bytes. `_spaced` maps the text between two spaces to bytes, including the first space.
    """

    def __init__(self, rules: WordRules, added: Mapping[str, int], form: bytes, zero: bytes):
        self._rules = rules
        self._words = _Spelled(rules, form, zero)
        self._spaced = _Spelled(rules, form, zero, rules.space, self._words)
        self._added = {token: self.spell([token_id]) for token, token_id in added.items()}
        self._split = splitter(added).split
        # The first character of all added tokens if they share it; else "", which is in every text.
        first = {token[0] for token in added}
        self._mark = first.pop() if len(first) == 1 else ""

    def spell(self, ids: Iterable[int]) -> bytes:
        """Spells ids."""
        return self._words.spell(ids)

    def content(self, text: str) -> bytes:
        """Spells a text that `begins_apart`, after one that `ends_apart`."""
        if self._mark in text:
            first, *others = self._split(text)
            return self._plain(first) + self._parts(others, 1)
        return self._plain(text)

    def whole(self, text: str) -> bytes:
        """Spells a text that is encoded by itself."""
        return self._parts(self._split(text), 0)

    def _plain(self, text: str) -> bytes:
        if len(text) > _LONG or not self._rules.is_single_spaced(text):
            return self._words.spell_long(self._rules.normalize(text))
        pieces = text.split(" ")
        if len(pieces) == 1:
            return self._words[text]
        spaced = self._spaced
        return self._words[pieces.pop(0)] + b"".join([spaced[piece] for piece in pieces])

    def _parts(self, parts: Iterable[str], number: int) -> bytes:
        spelled = []
        for place, part in enumerate(parts, number):
            if place % 2:
                spelled.append(self._added[part])
            elif part:
                # The normalizer treats the text between added tokens as a separate text.
                spelled.append(self._words.spell_long(self._rules.first + self._rules.normalize(part)))
        return b"".join(spelled)


class _Boundary(NamedTuple):
    """The spelled prefix and suffix of a content."""

    prefix: bytes
    suffix: bytes
    suffix_if_trained: bytes


class WordLines:
    """Turns conversations into lines. Use `word_lines`, which checks that this is exact.

    Attributes:
        different: Number of ids whose mask differs from `mask: compat`.
    """

    def __init__(self, rules: WordRules, added: Mapping[str, int], bos: int | None, exact: bool):
        self._rules, self._added, self._exact = rules, added, exact
        untrained = _Sign(rules, added, b"-%d, ", b"0, ")
        trained = _Sign(rules, added, b"%d, ", b"-0, " if exact else b"0, ")
        self._signs = untrained, trained
        self._bos = (untrained if exact else trained).spell([] if bos is None else [bos])
        self._boundaries: dict[tuple[str, str], _Boundary | None] = {}
        self.different = 0

    def line(self, conversation: Iterable[Turn]) -> bytes | None:
        """Returns a conversation's line, not truncated. Returns None if ids could cross the edge of a content."""
        boundaries, signs, begins_apart = self._boundaries, self._signs, self._rules.begins_apart
        pieces = [b'{"tokens": [', self._bos]
        different = _differing(self._bos, False, True)
        for turn in conversation:
            prefix, content, suffix, trained, suffix_trained, _, parts = turn
            try:
                boundary = boundaries[prefix, suffix]
            except KeyError:
                boundary = self._add_boundary(prefix, suffix)
            if boundary is None or not begins_apart(content):
                return None
            if self._exact and parts is not None:
                answer = one_answer(turn)
                if answer is None:
                    return None
            else:
                answer = trained
            spelled = signs[answer].content(content)
            suffix_answer = suffix_trained and answer if self._exact else suffix_trained
            suffix = boundary.suffix_if_trained if suffix_answer else boundary.suffix
            pieces += boundary.prefix, spelled, suffix
            if self._exact:
                different += _differing(spelled, answer, trained) + _differing(
                    suffix, suffix_answer, suffix_trained
                )
        if self._exact:
            self.different += different
        return b"".join(pieces).removesuffix(b", ") + b"]}\n"

    def _add_boundary(self, prefix: str, suffix: str) -> _Boundary | None:
        untrained, trained = self._signs
        boundary = None
        if self._is_clear(prefix, suffix):
            boundary = _Boundary(untrained.whole(prefix), untrained.whole(suffix), trained.whole(suffix))
        if len(self._boundaries) >= _MAX_BOUNDARIES:
            self._boundaries.clear()
        self._boundaries[prefix, suffix] = boundary
        return boundary

    def _is_clear(self, prefix: str, suffix: str) -> bool:
        """True if prefix and suffix cannot affect the ids of any text between them."""
        split = splitter(self._added).split
        parts = split(prefix)
        last = parts[-1]
        # The prefix must end with text that ends apart, and with a character that is in no added token.
        if not last or not self._rules.ends_apart(last) or any(last[-1] in token for token in self._added):
            return False
        # `exact` encodes turns together, unless control tokens separate them.
        if self._exact and parts[0]:
            return False
        if not suffix:
            return True
        # The suffix must start with an added token, and no added token from before may reach into it.
        return not split(suffix)[0] and not any(suffix[0] in token[1:] for token in self._added)


def _differing(spelled: bytes, exact: bool, compat: bool) -> int:
    """Returns the number of ids in bytes spelled for `exact` whose masks differ. compat never trains on id 0."""
    if exact:
        return spelled.count(b"-0,") if compat else spelled.count(b",")
    return spelled.count(b",") - (b" " + spelled).count(b" 0,") if compat else 0


def word_lines(
    rules: WordRules, spelling: Mapping[str, str], bos: int | None, exact: bool
) -> WordLines | None:
    """Returns a `WordLines`, or None if it would not be exact.

    Args:
        rules: The tokenizer's `word_rules`.
        spelling: New names of the control tokens in turns, if their own names are ordinary text.
        bos: The id that starts a line, if any.
        exact: True if the mask is `exact`.
    """
    # A control token's name must not become the token again when it is ordinary text.
    if not all(map(rules.is_never_text, spelling)):
        return None
    if not spelling.keys() <= rules.added.keys():
        return None
    added = {spelling.get(token, token): token_id for token, token_id in rules.added.items()}
    return WordLines(rules, added, bos, exact)
