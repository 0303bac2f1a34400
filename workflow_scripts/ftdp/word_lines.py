"""The lines of a `.bin` file straight from the turns' text: the hot path, for the tokenizers of `ftdp.word_encoder`.

What is remembered of a word is how the file spells its ids, `12, 345, ` where it is trained on and `-12, -345, ` where
it is not. A line is one join of such bytes: no list of ids is made, and nothing goes through the tokenizers library but
words that are new. Where no merge and no added token can cross the borders of begin, content and end, masks follow from
the text alone; a conversation with other borders is left to `ftdp.encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tokenizers import Tokenizer

from ftdp.chat_template import Turn
from ftdp.exact_mask import one_answer
from ftdp.word_encoder import SPACE, WordRules, splitter

# About 10 MB a table in each process; there are four.
_MAX_ENTRIES = 1 << 15
_MAX_CHARACTERS = 24
# From here on words are handled one after the other, not as a list: a text may have millions.
_LONG = 1 << 16
_MAX_BORDERS = 4096


class _Spelled(dict[str, bytes]):
    """Text -> how a `.bin` file spells its ids, each with ", " behind it. Remembers short texts.

    Args:
        tokenize: The model's function for one word.
        rules: The tokenizer's.
        form: How an id is written.
        prefix: Stands before each text.
        words: Where to look up words if a text is more than one; by default here.
    """

    def __init__(
        self,
        tokenize: Callable,
        rules: WordRules,
        form: bytes,
        prefix: str = "",
        words: _Spelled | None = None,
    ):
        super().__init__()
        self._tokenize, self._rules, self._form, self._prefix = tokenize, rules, form, prefix
        self._words = self if words is None else words

    def __missing__(self, text: str) -> bytes:
        whole = self._prefix + text
        if len(whole) > _LONG:
            return self.spell_long(whole)
        words = self._rules.words.findall(whole)
        if len(words) == 1:
            spelled = b"".join([self._form % token.id for token in self._tokenize(whole)])
        else:
            spelled = b"".join(map(self._words.__getitem__, words))
        if len(text) <= _MAX_CHARACTERS:
            if len(self) >= _MAX_ENTRIES:
                self.clear()
            self[text] = spelled
        return spelled

    def spell_long(self, whole: str) -> bytes:
        """Returns the same for a text of many words, with little memory."""
        words = self._words
        if len(whole) <= _LONG:
            return b"".join(map(words.__getitem__, self._rules.words.findall(whole)))
        return b"".join([words._word(match[0]) for match in self._rules.words.finditer(whole)])

    def _word(self, word: str) -> bytes:
        """Looks up what is known to be one word; it may be long."""
        if len(word) <= _LONG:
            return self[word]
        return b"".join([self._form % token.id for token in self._tokenize(word)])


class _Sign:
    """Spells texts that are all trained on, or all not.

    `words` maps words to bytes. `spaced` maps what stands between two spaces, the first of them included.
    """

    def __init__(self, tokenizer: Tokenizer, rules: WordRules, added: Mapping[str, int], form: bytes):
        tokenize = tokenizer.model.tokenize
        self._words = _Spelled(tokenize, rules, form)
        self._spaced = _Spelled(tokenize, rules, form, SPACE, self._words)
        self._added = {token: form % token_id for token, token_id in added.items()}
        self._split = splitter(added).split
        # "" is in every text.
        first = {token[0] for token in added}
        self._mark = first.pop() if len(first) == 1 else ""

    def content(self, text: str) -> bytes:
        """Spells a text that follows a character which is a word of its own."""
        if self._mark in text:
            first, *others = self._split(text)
            return self._plain(first) + self._parts(others, 1)
        return self._plain(text)

    def whole(self, text: str) -> bytes:
        """Spells a text that is encoded by itself."""
        return self._parts(self._split(text), 0)

    def _plain(self, text: str) -> bytes:
        if "  " in text or SPACE in text or len(text) > _LONG:
            # Spaces that follow each other are one word.
            return self._words.spell_long(text.replace(" ", SPACE))
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
                # The normalizer puts a space in front of whatever stands between added tokens.
                spelled.append(self._words.spell_long(SPACE + part.replace(" ", SPACE)))
        return b"".join(spelled)


class _Border(NamedTuple):
    """What stands around a content, spelled."""

    begin: bytes
    end: bytes
    end_if_trained: bytes


class WordLines:
    """Makes lines of turns. Made by `word_lines`, which checks that this is exact.

    Attributes:
        different: How many ids have another mask with `mask: compat`, since `WordLines` was made.
    """

    def __init__(
        self, tokenizer: Tokenizer, rules: WordRules, added: Mapping[str, int], bos: int, exact: bool
    ):
        self._rules, self._added, self._exact = rules, added, exact
        # Id 0 has no negative: `ftdp.piece` knows how it is written. No word has it (see `word_lines`).
        self._zero = next(token for token, token_id in added.items() if token_id == 0)
        self._signs = tuple(_Sign(tokenizer, rules, added, form) for form in (b"-%d, ", b"%d, "))
        self._start = b'{"tokens": [' + (b"-%d, " if exact else b"%d, ") % bos
        self._borders: dict[tuple[str, str], _Border | None] = {}
        self.different = 0

    def line(self, conversation: Iterable[Turn]) -> bytes | None:
        """Returns a conversation's line, not cut; None where ids could cross a border."""
        borders, signs = self._borders, self._signs
        pieces = [self._start]
        different = 1
        for turn in conversation:
            begin, content, end, trained, end_trained, _, parts = turn
            try:
                border = borders[begin, end]
            except KeyError:
                border = self._add_border(begin, end)
            if border is None or self._zero in content:
                return None
            if self._exact and parts is not None:
                answer = one_answer(turn)
                if answer is None:
                    return None
            else:
                answer = trained
            spelled = signs[answer].content(content)
            ends = end_trained and answer if self._exact else end_trained
            pieces += border.begin, spelled, border.end_if_trained if ends else border.end
            if answer != trained:
                different += spelled.count(b",")
            if ends != end_trained:
                different += border.end.count(b",")
        if self._exact:
            self.different += different
        return b"".join(pieces)[:-2] + b"]}\n"

    def _add_border(self, begin: str, end: str) -> _Border | None:
        untrained, trained = self._signs
        border = None
        if self._is_clear(begin, end):
            border = _Border(untrained.whole(begin), untrained.whole(end), trained.whole(end))
        if len(self._borders) >= _MAX_BORDERS:
            self._borders.clear()
        self._borders[begin, end] = border
        return border

    def _is_clear(self, begin: str, end: str) -> bool:
        """Are the ids of any text between begin and end its own?"""
        split = splitter(self._added).split
        parts = split(begin)
        last = parts[-1][-1:]
        # The begin ends with text, and that with a character which is a word of its own and in no added token.
        if not last or last in self._rules.merging or any(last in token for token in self._added):
            return False
        # `exact` encodes turns together, unless control tokens keep them apart.
        if (self._exact and parts[0]) or self._zero in begin + end:
            return False
        if not end:
            return True
        # The end begins with an added token, and none that begins before it can reach into it.
        return not split(end)[0] and not any(end[0] in token[1:] for token in self._added)


def word_lines(
    tokenizer: Tokenizer,
    rules: WordRules,
    spelling: Mapping[str, str],
    bos: int | None,
    exact: bool,
) -> WordLines | None:
    """Returns what makes lines of turns, or None where that would not be exact.

    Args:
        tokenizer: The tokenizer.
        rules: What `word_rules` says of it.
        spelling: How the turns spell control tokens, where their own names are to be text.
        bos: The id that a line begins with.
        exact: Is the mask `exact`?
    """
    # Lines with id 0 are left to `ftdp.encode`; only an added token may have it.
    if not bos or 0 not in rules.added.values():
        return None
    # As text a control token's name must not become the token again.
    if any(len(name) == 1 or name in rules.products for name in spelling):
        return None
    if not spelling.keys() <= rules.added.keys():
        return None
    added = {spelling.get(token, token): token_id for token, token_id in rules.added.items()}
    return WordLines(tokenizer, rules, added, bos, exact)
