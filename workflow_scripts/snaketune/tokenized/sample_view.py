"""Shows a document in readable form: trained and masked text, and special tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snaketune.common.cli import UserError
from snaketune.common.files import sha256_file
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.tokenized.bin_reader import IGNORE_INDEX, TokenizedFile
from snaketune.tokenized.manifests import FileEntry

_RESET = "\x1b[0m"
# By (trained, special).
_COLOURS = {
    (True, False): "\x1b[32m",
    (True, True): "\x1b[1;30;42m",
    (False, False): "\x1b[2m",
    (False, True): "\x1b[1;35m",
}
_LEGEND = (
    ((True, False), "trained"),
    ((True, True), "trained, special token"),
    ((False, False), "masked"),
    ((False, True), "masked, special token"),
)
# Characters that control a terminal or hide text. An escape sequence in the data must not take effect.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class Token(NamedTuple):
    """One token of a document."""

    id: int
    trained: bool
    special: bool


class Sample:
    """A document of a `.bin` file, with the tokenizer that made it.

    Args:
        path: The `.bin` file.
        number: Number of the document, from 0; negative numbers count from the end.
        tokenizer: The tokenizer.

    Raises:
        UserError: The number is out of range.
    """

    def __init__(self, path: Path, number: int, tokenizer: ExtendedTokenizer):
        file = TokenizedFile(path)
        if not -len(file) <= number < len(file):
            raise UserError(
                f"{path} has no document {number}",
                found=f"{len(file)} documents",
                expected="a smaller number: documents are numbered from 0",
            )
        self.path, self.samples = path, len(file)
        self.number = number % len(file)
        self._tokenizer = tokenizer.tokenizer
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        special |= set(tokenizer.ids.values())
        ids, labels = file[self.number]
        self.tokens = [
            Token(int(i), bool(label != IGNORE_INDEX), int(i) in special)
            for i, label in zip(np.abs(ids), labels, strict=True)
        ]
        # A decoder may treat the first token differently. A special token in front makes all of them equal.
        self._anchor = next(iter(tokenizer.ids.values()), tokenizer.bos_token_id)

    def pieces(self) -> Iterator[tuple[bool, bool, str]]:
        """Yields (trained, special, text) for each run of tokens of one kind; special tokens come one by one."""
        for (trained, special), group in groupby(self.tokens, lambda token: (token.trained, token.special)):
            ids = [token.id for token in group]
            for each in [[i] for i in ids] if special else [ids]:
                yield trained, special, self._text(each)

    def name_of(self, token: int) -> str:
        """Returns a token's entry in the vocabulary."""
        return self._tokenizer.id_to_token(token) or "(no such id)"

    def summary(self) -> list[str]:
        """Returns the counts, as lines of text."""
        total, trained = len(self.tokens), sum(token.trained for token in self.tokens)
        special = Counter(token for token in self.tokens if token.special)
        names = [
            f"{self.name_of(token.id)} x{count} ({'trained' if token.trained else 'masked'})"
            for token, count in special.items()
        ]
        return [
            f"{self.path}: document {self.number} of {self.samples:,}",
            f"{total:,} tokens, {trained:,} trained on ({trained / max(1, total):.1%})",
            f"special tokens: {', '.join(names) or 'none'}",
        ]

    def _text(self, ids: list[int]) -> str:
        before = self._tokenizer.decode([self._anchor], skip_special_tokens=False)
        return self._tokenizer.decode([self._anchor, *ids], skip_special_tokens=False)[len(before) :]


def paint(sample: Sample, colour: bool) -> str:
    """Returns the document as text, in colour or with `[+ +]` around trained text and `[= =]` around special tokens.

    A typed `<|im_end|>` thus looks different from one that ends a turn.
    """
    parts = []
    if colour:
        for trained, special, text in sample.pieces():
            start = _COLOURS[trained, special]
            # Each line sets its own colour, so that a pager can start anywhere.
            painted = shown(text).replace("\n", f"\u21b5{_RESET}\n{start}")
            parts.append(f"{start}{painted}{_RESET}")
    else:
        for trained, group in groupby(sample.pieces(), lambda piece: piece[0]):
            text = "".join(f"[={shown(each)}=]" if special else shown(each) for _, special, each in group)
            parts.append(f"[+{text}+]" if trained else text)
    return "".join(parts)


def legend(colour: bool) -> str:
    """Returns the line that explains `paint`."""
    if not colour:
        return "[+trained on+], all else is masked; [=special token=]"
    return "   ".join(f"{_COLOURS[kind]}{name}{_RESET}" for kind, name in _LEGEND)


def token_table(sample: Sample) -> str:
    """Returns one line per token: position, id, trained or masked, vocabulary entry."""
    lines = ["  place        id           entry"]
    for place, token in enumerate(sample.tokens):
        mark = "trained" if token.trained else "masked"
        lines.append(f"{place:7} {token.id:9}  {mark:9} {shown(sample.name_of(token.id))}")
    return "\n".join(lines)


def find_tokenizer(path: Path, entry: FileEntry | None) -> Path:
    """Returns the folder of the tokenizer that made a `.bin` file in the workflow's results.

    Raises:
        UserError: There is none.
    """
    if entry is not None:
        # <results>/shared/data/<data>/... beside <results>/shared/tokenizer/<tokenizer>/
        for folder in sorted((entry.path.parents[1].parent.parent / "tokenizer").glob("*")):
            file = folder / "tokenizer.json"
            if file.is_file() and sha256_file(file) == entry.manifest["tokenizer_sha256"]:
                return folder
    raise UserError(
        f"the tokenizer of {path} is unknown",
        expected="the folder of the extended tokenizer that it was tokenised with",
        fix="pass it with --tokenizer-path",
    )


def shown(text: str) -> str:
    """Escapes control characters, so that they neither act on a terminal nor hide text."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
