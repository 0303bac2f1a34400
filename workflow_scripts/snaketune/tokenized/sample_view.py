"""Shows a tokenised sample to a person: what is trained on, what is masked, which tokens are special."""

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
# What a terminal would act upon. Data must not: an escape sequence in a conversation stays text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class Token(NamedTuple):
    """One token of a sample."""

    id: int
    trained: bool
    special: bool


class Sample:
    """A sample of a `.bin` file with the tokenizer that made it.

    Args:
        path: The `.bin` file.
        number: The sample, from 0; negative numbers count from the end.
        tokenizer: The tokenizer.

    Raises:
        UserError: There is no such sample.
    """

    def __init__(self, path: Path, number: int, tokenizer: ExtendedTokenizer):
        file = TokenizedFile(path)
        if not -len(file) <= number < len(file):
            raise UserError(
                f"{path} has no sample {number}", found=f"{len(file)} samples", expected="0 to one less"
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
        # A decoder may treat the first token in another way than the rest; a special one in front keeps all alike.
        self._anchor = next(iter(tokenizer.ids.values()), tokenizer.bos_token_id)

    def pieces(self) -> Iterator[tuple[bool, bool, str]]:
        """Yields (trained, special, text) of the stretches of one kind, each special token on its own."""
        for (trained, special), group in groupby(self.tokens, lambda token: (token.trained, token.special)):
            ids = [token.id for token in group]
            for each in [[i] for i in ids] if special else [ids]:
                yield trained, special, self._text(each)

    def name_of(self, token: int) -> str:
        """Returns the entry of the vocabulary."""
        return self._tokenizer.id_to_token(token) or "(no such id)"

    def summary(self) -> list[str]:
        """Returns what is counted, line by line."""
        total, trained = len(self.tokens), sum(token.trained for token in self.tokens)
        special = Counter(token for token in self.tokens if token.special)
        names = [
            f"{self.name_of(token.id)} x{count} ({'trained' if token.trained else 'masked'})"
            for token, count in special.items()
        ]
        return [
            f"{self.path}: sample {self.number} of {self.samples:,}",
            f"{total:,} tokens, {trained:,} trained on ({trained / max(1, total):.1%})",
            f"special tokens: {', '.join(names) or 'none'}",
        ]

    def _text(self, ids: list[int]) -> str:
        before = self._tokenizer.decode([self._anchor], skip_special_tokens=False)
        return self._tokenizer.decode([self._anchor, *ids], skip_special_tokens=False)[len(before) :]


def paint(sample: Sample, colour: bool) -> str:
    """Returns the sample as text: in colour, or with `[+ +]` around what is trained on and `[= =]` around special tokens.

    So a `<|im_end|>` that somebody typed looks different from one that ends a turn.
    """
    parts = []
    if colour:
        for trained, special, text in sample.pieces():
            start = _COLOURS[trained, special]
            # Each line carries its own colour, so that a pager can begin anywhere.
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
    """Returns one line a token: place, id, whether it is trained on, the vocabulary's entry."""
    lines = ["  place        id           entry"]
    for place, token in enumerate(sample.tokens):
        mark = "trained" if token.trained else "masked"
        lines.append(f"{place:7} {token.id:9}  {mark:9} {shown(sample.name_of(token.id))}")
    return "\n".join(lines)


def find_tokenizer(path: Path, entry: FileEntry | None) -> Path:
    """Returns the folder of the tokenizer that made a `.bin` file, where the workflow put it.

    Raises:
        UserError: It is not there.
    """
    if entry is not None:
        # <results>/shared/data/<data>/... beside <results>/shared/tokenizer/<tokenizer>/
        for folder in sorted((entry.path.parents[1].parent.parent / "tokenizer").glob("*")):
            file = folder / "tokenizer.json"
            if file.is_file() and sha256_file(file) == entry.manifest["tokenizer_sha256"]:
                return folder
    raise UserError(
        f"the tokenizer of {path} is not known",
        expected="the folder of the extended tokenizer that it was tokenised with",
        fix="give it with --tokenizer-path",
    )


def shown(text: str) -> str:
    """Returns a text with control characters, which would act on a terminal or hide things, spelt out."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
