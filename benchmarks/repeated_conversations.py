"""Builds a large set of conversations from a small one, for the tokenising benchmarks.

Repeating texts unchanged would favour tokenisers that cache texts, but users' files do not repeat theirs. So
each repetition after the first changes all digits and replaces a quarter of its words (or runs of Chinese
characters) with others from the same texts. Every fiftieth word becomes a new one, built from the halves of
two. Seeded: equal calls write equal files.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

_CHANGED = re.compile(r"[A-Za-z]{4,}|[0-9]|[一-鿿]+")
_OTHER, _NEW = 0.25, 0.02


def repeat_files(source: Path, target: Path, megabytes: float | None, unchanged: bool = False) -> None:
    """Copies the JSONL files below `source`, repeating each equally often, up to a total size.

    Args:
        source: Folder in the processed ftdp layout.
        target: Folder for the longer files.
        megabytes: Total size; None copies each file once.
        unchanged: True repeats the texts without changes.
    """
    files = sorted(source.rglob("*.jsonl"))
    total = sum(file.stat().st_size for file in files)
    times = max(round((megabytes or 0) * 1e6 / total), 1)
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8")
        vary = _Variation([json.loads(line) for line in text.splitlines()])
        with open(copy, "w", encoding="utf-8") as stream:
            for number in range(times):
                stream.write(text if unchanged or number == 0 else vary.repetition())


class _Variation:
    """Returns conversations with changed words."""

    def __init__(self, conversations: list[list[dict]]):
        self._conversations, self._rng = conversations, random.Random(0)
        contents = (message["content"] for messages in conversations for message in messages)
        # Words keep their frequency in the texts.
        self._words = [word for content in contents for word in _CHANGED.findall(content)]
        self._words = {
            latin: [word for word in self._words if not word.isdigit() and word.isascii() == latin]
            or ["word"]
            for latin in (True, False)
        }

    def repetition(self) -> str:
        changed = [
            [message | {"content": _CHANGED.sub(self._other, message["content"])} for message in messages]
            for messages in self._conversations
        ]
        return "".join(json.dumps(messages, ensure_ascii=False) + "\n" for messages in changed)

    def _other(self, match: re.Match) -> str:
        word, chance = match[0], self._rng.random()
        if word.isdigit():
            return str(int(chance * 10))
        words = self._words[word.isascii()]
        if chance < _NEW:
            first, second = self._rng.choice(words), self._rng.choice(words)
            return first[: (len(first) + 1) // 2] + second[len(second) // 2 :]
        return self._rng.choice(words) if chance < _OTHER else word
