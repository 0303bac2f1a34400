"""Conversations to signed token ids, as XTuner 0.2.0 stores them: an id that is not trained on is negated.

All turns of a batch go through the tokenizer in one call. Begins and ends repeat, so their ids are cached. The ids of
a content are those of `begin + content + end` without the first `len(begin ids)` and the last `len(end ids)`: where
the tokenizer merges across a border (a content that starts with a line break), this drops or shifts an id, and that
is what XTuner's files hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import orjson
from tokenizers import Tokenizer

from ftdp.chat_template import MAX_LENGTH, Turn, refuse_half_characters, turns
from ftdp.tokenizer import ExtendedTokenizer
from ftdp.word_encoder import word_encoder


class Piece(NamedTuple):
    """Consecutive ids that are trained on all alike.

    Attributes:
        ids: The ids, still unsigned.
        trained: False negates them in the file.
        written: How the file spells them, where that is known already.
    """

    ids: list[int]
    trained: bool
    written: bytes | None = None

    def write(self) -> bytes:
        """Returns the ids as `json.dumps` writes them, without brackets; negated where they are not trained on.

        Works on bytes: orjson and two replacements cost about a tenth of what `json.dumps` of a negated list does.
        """
        if self.written is not None:
            return self.written
        if not self.ids:
            return b""
        text = orjson.dumps(self.ids)[1:-1]
        if self.trained:
            return text.replace(b",", b", ")
        text = b"-" + text.replace(b",", b", -")
        # No id is written with a leading zero, so "-0" is the id 0, whose negative is 0.
        return text.replace(b"-0", b"0") if b"-0" in text else text


class BatchEncoder:
    """Encodes conversations with one tokenizer, caching the ids of begins and ends."""

    # Names are free text: a corpus with a name a user must not fill the memory.
    _MAX_CACHED = 4096

    def __init__(self, tokenizer: ExtendedTokenizer, many: bool = False):
        """Prepares an encoder.

        Args:
            tokenizer: The extended tokenizer.
            many: Spend a fraction of a second on a faster way to the same ids, where the tokenizer has one.
        """
        self._tokenizer: Tokenizer = tokenizer.tokenizer
        self._words = word_encoder(self._tokenizer) if many else None
        self.bos = Piece([tokenizer.bos_token_id], True)
        self._cache: dict[tuple[str, bool], Piece] = {}

    def encode_turns(self, conversations: Sequence[list[Turn]]) -> list[list[Piece]]:
        """Returns the pieces of each conversation, BOS first, not truncated."""
        every = [turn for conversation in conversations for turn in conversation]
        self._fill_cache(every)
        # Many conversations share a system message, often a long one: each text is encoded once a batch.
        texts = [turn.begin + turn.content + turn.end for turn in every]
        ids_of = self._encode(dict.fromkeys(texts))
        ids = map(ids_of.__getitem__, texts)
        cache = self._cache
        result = []
        for conversation in conversations:
            pieces = [self.bos]
            for turn in conversation:
                begin, end = cache[turn.begin, False], cache[turn.end, turn.end_trained]
                content = next(ids)[len(begin.ids) : -len(end.ids)]
                pieces += begin, Piece(content, turn.content_trained), end
            result.append(pieces)
        if len(cache) > self._MAX_CACHED:
            cache.clear()
        return result

    def _fill_cache(self, every: list[Turn]) -> None:
        wanted = {(turn.begin, False) for turn in every} | {(turn.end, turn.end_trained) for turn in every}
        missing = [key for key in wanted if key not in self._cache]
        ids_of = self._encode({text for text, _ in missing})
        for text, trained in missing:
            piece = Piece(ids_of[text], trained)
            self._cache[text, trained] = piece._replace(written=piece.write())

    def _encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        if self._words:
            return self._words.encode(texts)
        texts = list(texts)
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}


def signed_ids(pieces: Iterable[Piece], max_length: int | None = MAX_LENGTH) -> list[int]:
    """Joins pieces to signed ids, cut at `max_length`."""
    ids: list[int] = []
    for piece in pieces:
        ids += piece.ids if piece.trained else [-token for token in piece.ids]
    return ids[:max_length]


def encode_conversations(
    conversations: Iterable[list[dict]], tokenizer: ExtendedTokenizer, max_length: int | None = MAX_LENGTH
) -> list[list[int]]:
    """Returns the signed ids of each conversation: BOS first, untrained ids negated, cut at `max_length`.

    Raises:
        MessageError: A conversation is not in the format.
    """
    encoder = BatchEncoder(tokenizer)
    as_turns = [turns(messages) for messages in conversations]
    for each in as_turns:
        refuse_half_characters(each)
    pieces = encoder.encode_turns(as_turns)
    return [signed_ids(each, max_length) for each in pieces]


def encode_conversation(
    messages: list[dict], tokenizer: ExtendedTokenizer, max_length: int | None = MAX_LENGTH
) -> list[int]:
    """Returns the signed ids of one conversation (see `encode_conversations`)."""
    return encode_conversations([messages], tokenizer, max_length)[0]
