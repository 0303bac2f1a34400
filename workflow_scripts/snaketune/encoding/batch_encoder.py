"""Encodes conversations as signed token ids, as XTuner 0.2.0 stores them: ids that are not trained on are negated.

All turns of a batch go through the tokenizer in one call. Prefixes and suffixes repeat, so their ids are cached. With
`mask: compat`, the ids of a content are those of `prefix + content + suffix` without the first `len(prefix ids)` and
the last `len(suffix ids)`. If the tokenizer merges across an edge of the content, such as a leading line break, this
drops or shifts an id, as in XTuner's files. For `mask: exact` see `snaketune.encoding.exact_mask`, for
`control_tokens: literal` see `snaketune.encoding.control_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from snaketune.chat_format.chat_template import MessageError, Turn, refuse_half_characters
from snaketune.chat_format.template_file import check_mask
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.control_tokens import (
    control_pattern,
    literal_spelling,
    literal_tokenizer,
    without_trimming,
)
from snaketune.encoding.control_tokens import control_tokens as find_control_tokens
from snaketune.encoding.exact_mask import Span, difference, encode_spans, one_answer, spans_of
from snaketune.encoding.signed_ids import TokenSpan, signed_ids
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.encoding.word_encoder import WordEncoder, word_encoder
from snaketune.encoding.word_lines import WordLines, word_lines
from snaketune.encoding.word_rules import WordRules, word_rules
from snaketune.settings.schema import default_of


class BatchEncoder:
    """Encodes conversations with one tokenizer, and caches the ids of prefixes and suffixes.

    Make turns with the method `turns`, not with another template: with `control_tokens="literal"` the control tokens
    in a turn are renamed.

    Attributes:
        encoding: How conversations become ids.
        template: The chat template, with renamed control tokens if they are literal in messages.
    """

    # Names are free text: a corpus with a different name for each user must not fill the memory.
    _MAX_CACHED = 4096

    def __init__(self, tokenizer: ExtendedTokenizer, encoding: ChatEncoding, *, many: bool = False):
        """Prepares an encoder.

        Args:
            tokenizer: The extended tokenizer.
            encoding: How conversations become ids.
            many: True prepares `line`, if the tokenizer allows it.

        Raises:
            UserError: The tokenizer lacks tokens of the template, or the mask is compat and the template is not
                InternLM2's.
        """
        template = tokenizer.with_template(encoding.template).template
        check_mask(template, encoding.mask)
        tokenizer.require(template)
        self.encoding, self._exact = encoding, encoding.exact
        literal = encoding.control_tokens == "literal"
        self._extended, self._also, self._many = tokenizer, template.special_tokens, many
        tokens = find_control_tokens(tokenizer.tokenizer, template.special_tokens)
        self._control_tokens, self._control = tokens, control_pattern(tokens).search
        bos = tokenizer.tokens.get("bos_token", "") if template.bos else ""
        self._spelling = literal_spelling(tuple(tokens)) if literal else {}
        template = template.respelled(self._spelling)
        self._bos_text = self._spelling.get(bos, bos)
        self._anchors = tuple(self._spelling.get(token, token) for token in tokens)
        self.template = template
        self._bos = [TokenSpan([tokenizer.bos_token_id], not self._exact)] if template.bos else []
        self._lines = self._prepare_lines() if many else None
        if self._lines is None:
            _ = self._tokenizer  # fail early if it cannot be built
        self._cache: dict[tuple[str, bool], TokenSpan] = {}
        self._plain_prefixes: dict[str, bool] = {}
        self._counts = dict.fromkeys(
            ("straddling_messages", "tokens_differing_from_compat", "control_messages"), 0
        )

    def turns(self, messages: Any) -> list[Turn]:
        """Returns the turns of a conversation, for `encode_turns`.

        Raises:
            MessageError: The conversation is not in the format, or has a control token with `control_tokens="error"`.
        """
        if self.encoding.control_tokens == "error":
            self._refuse_control_tokens(messages)
        return self.template.turns(messages, self._exact)

    def encode_turns(self, conversations: Sequence[list[Turn]]) -> list[list[TokenSpan]]:
        """Returns the token spans of each conversation, not truncated. BOS comes first if the template has it."""
        if not conversations:
            return []  # without building the lazy properties
        every = [turn for conversation in conversations for turn in conversation]
        self._fill_cache(every)
        self.count_control_tokens(every)
        # Many conversations share a long system message, so each text is encoded once per batch.
        texts = [turn.prefix + turn.content + turn.suffix for turn in every]
        ids_of = self._encode(dict.fromkeys(texts))
        encode = self._exact_pieces if self._exact else self._compat_pieces
        result = encode(conversations, list(map(ids_of.__getitem__, texts)))
        if len(self._cache) > self._MAX_CACHED:
            self._cache.clear()
            self._plain_prefixes.clear()
        return result

    def line(self, conversation: list[Turn]) -> bytes | None:
        """Returns a conversation's line of a `.bin` file, not truncated.

        Returns None if the ids depend on more than single words, which only `encode_turns` can handle.
        """
        return self._lines.line(conversation) if self._lines else None

    def take_counts(self) -> dict[str, int]:
        """Returns the counts since the last call.

        `straddling_messages`: turns where the tokenizer merges across the content's edge with the prefix or suffix.
        `tokens_differing_from_compat`: positions where `exact` has a different id or sign, before truncation.
        `control_messages`: messages with a control token in the content or the name.
        """
        counts = dict(self._counts)
        if self._lines:
            counts["tokens_differing_from_compat"] += self._lines.different
            self._lines.different = 0
        self._counts = dict.fromkeys(counts, 0)
        return counts

    def _compat_pieces(
        self, conversations: Sequence[list[Turn]], every_ids: list[list[int]]
    ) -> list[list[TokenSpan]]:
        cache, ids_of_next = self._cache, iter(every_ids)
        straddling = 0
        result = []
        for conversation in conversations:
            spans = list(self._bos)
            for turn in conversation:
                prefix, suffix = cache[turn.prefix, False], cache[turn.suffix, turn.suffix_trained]
                ids = next(ids_of_next)
                content = _cut(ids, prefix.ids, suffix.ids)
                straddling += content is None
                if content is None:
                    content = ids[len(prefix.ids) : -len(suffix.ids) or None]
                spans += prefix, TokenSpan(content, turn.content_trained), suffix
            result.append(spans)
        self._counts["straddling_messages"] += straddling
        return result

    def _exact_pieces(
        self, conversations: Sequence[list[Turn]], every_ids: list[list[int]]
    ) -> list[list[TokenSpan]]:
        ids_of_next = iter(every_ids)
        straddling = different = 0
        result: list[list[TokenSpan]] = []
        # To encode again with offsets: (where the result goes, the text as spans, the spans by XTuner's rule).
        later: list[tuple[list[TokenSpan], list[Span], list[TokenSpan]]] = []
        for conversation in conversations:
            pieces: list[TokenSpan] = list(self._bos)
            different += sum(piece.ids != [0] for piece in pieces)
            result.append(pieces)
            chunks = self._chunks(conversation)
            for number, chunk in enumerate(chunks):
                alone = len(chunk) == 1 and self._is_plain_prefix(chunk[0].prefix)
                compat: list[TokenSpan] = []
                for turn in chunk:
                    prefix, suffix = (
                        self._cache[turn.prefix, False],
                        self._cache[turn.suffix, turn.suffix_trained],
                    )
                    ids = next(ids_of_next)
                    content = _cut(ids, prefix.ids, suffix.ids)
                    answer = one_answer(turn)
                    straddling += content is None
                    if alone and content is not None and answer is not None:
                        suffix_trained = answer and turn.suffix_trained
                        pieces += prefix, TokenSpan(content, answer), self._piece(suffix, suffix_trained)
                        different += _different(suffix.ids, suffix_trained, turn.suffix_trained)
                        different += _different(content, answer, turn.content_trained)
                        break
                    if content is None:
                        content = ids[len(prefix.ids) : -len(suffix.ids) or None]
                    compat += prefix, TokenSpan(content, turn.content_trained), suffix
                else:
                    spans = [span for turn in chunk for span in spans_of(turn)]
                    if number == 0 and self._bos and not chunk[0].prefix.startswith(self._anchors):
                        # Text after BOS may be encoded differently from text at the start.
                        compat[:0] = pieces[:1]
                        pieces.clear()
                        spans.insert(0, Span(self._bos_text, False))
                        different -= self._bos[0].ids != [0]
                    slot: list[TokenSpan] = []
                    pieces.append(slot)  # type: ignore[arg-type]  (filled below)
                    later.append((slot, spans, compat))
        if later:
            for (slot, _, compat), found in zip(
                later, encode_spans(self._offsets_tokenizer, [spans for _, spans, _ in later]), strict=True
            ):
                slot += found
                different += difference(found, compat)
            result = [_flat(pieces) for pieces in result]
        self._counts["straddling_messages"] += straddling
        self._counts["tokens_differing_from_compat"] += different
        return result

    def _chunks(self, conversation: list[Turn]) -> list[list[Turn]]:
        """Splits a conversation before turns that start with a control token. Their text is encoded independently."""
        chunks: list[list[Turn]] = []
        for turn in conversation:
            if chunks and not turn.prefix.startswith(self._anchors):
                chunks[-1].append(turn)
            else:
                chunks.append([turn])
        return chunks

    def _is_plain_prefix(self, prefix: str) -> bool:
        """True if the prefix starts with a control token and each of its ids stands for known characters."""
        plain = self._plain_prefixes.get(prefix)
        if plain is None:
            ids = self._cache[prefix, False].ids
            plain = prefix.startswith(self._anchors) and self._unknown not in ids
            self._plain_prefixes[prefix] = plain
        return plain

    def _piece(self, span: TokenSpan, trained: bool) -> TokenSpan:
        return span if span.trained == trained else TokenSpan(span.ids, trained)

    # Built lazily: with some tokenizers, most conversations never need these.

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if self._spelling:
            return literal_tokenizer(self._extended, self._also).tokenizer
        return self._extended.tokenizer

    @cached_property
    def _rules(self) -> WordRules | None:
        return word_rules(self._extended.tokenizer, self._extended.text)

    @cached_property
    def _words(self) -> WordEncoder | None:
        if not self._many:
            return None
        if self._spelling:
            return word_encoder(self._tokenizer)
        return WordEncoder(self._rules) if self._rules else None

    @cached_property
    def _offsets_tokenizer(self) -> Tokenizer:
        return without_trimming(self._tokenizer)

    @cached_property
    def _unknown(self) -> int | None:
        return _unknown_id(self._tokenizer)

    def _prepare_lines(self) -> WordLines | None:
        bos = self._extended.bos_token_id if self._bos else None
        return self._rules and word_lines(self._rules, self._spelling, bos, self._exact)

    def _fill_cache(self, every: list[Turn]) -> None:
        wanted = {(turn.prefix, False) for turn in every} | {
            (turn.suffix, turn.suffix_trained) for turn in every
        }
        missing = [key for key in wanted if key not in self._cache]
        ids_of = self._encode({text for text, _ in missing})
        for text, trained in missing:
            span = TokenSpan(ids_of[text], trained)
            self._cache[text, trained] = span._replace(written=span.write(self._exact))

    def count_control_tokens(self, every: Iterable[Turn]) -> None:
        """Counts the messages with a control token. `encode_turns` calls this itself."""
        texts = []
        for turn in every:
            if turn.parts is None and turn.name is None:
                texts.append(turn.content)
            else:
                texts += turn.user_texts()
        joined = "\0".join(texts)
        if any(token in joined for token in self._control_tokens):
            self._counts["control_messages"] += sum(self._control(text) is not None for text in texts)

    def _refuse_control_tokens(self, messages: Any) -> None:
        if type(messages) is not list:
            return  # `turns` raises the error
        for index, message in enumerate(messages):
            for key in ("content", "name"):
                value = message.get(key) if isinstance(message, dict) else None
                found = self._control(value) if isinstance(value, str) else None
                if found:
                    raise MessageError(
                        f"[{index}].{key}",
                        found=f"the control token {found[0]} in it",
                        expected="text without control tokens",
                        fix="remove it, or set control_tokens to literal to treat it as ordinary text",
                    )

    def _encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        if self._words:
            return self._words.encode(texts)
        texts = list(texts)
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}


def encode_conversations(
    conversations: Iterable[list[dict]],
    tokenizer: ExtendedTokenizer,
    encoding: ChatEncoding,
    max_length: int | None = default_of("data.max_tokens"),
) -> list[list[int]]:
    """Returns the signed ids of each conversation: BOS first, untrained ids negated, cut at `max_length`.

    Args:
        conversations: Lists of messages.
        tokenizer: The extended tokenizer.
        encoding: How conversations become ids.
        max_length: Tokens to keep of a conversation; None keeps all.

    Raises:
        MessageError: A conversation is not in the format.
    """
    encoder = BatchEncoder(tokenizer, encoding)
    as_turns = [encoder.turns(messages) for messages in conversations]
    for each in as_turns:
        refuse_half_characters(each)
    return [signed_ids(each, max_length) for each in encoder.encode_turns(as_turns)]


def encode_conversation(
    messages: list[dict],
    tokenizer: ExtendedTokenizer,
    encoding: ChatEncoding,
    max_length: int | None = default_of("data.max_tokens"),
) -> list[int]:
    """Returns the signed ids of one conversation (see `encode_conversations`)."""
    return encode_conversations([messages], tokenizer, encoding, max_length)[0]


def _cut(ids: list[int], prefix: list[int], suffix: list[int]) -> list[int] | None:
    """Returns the ids between prefix and suffix, or None if `ids` does not start and end with them."""
    first, last = len(prefix), len(ids) - len(suffix)
    if last < first or ids[:first] != prefix or ids[last:] != suffix:
        return None
    return ids[first:last]


def _different(ids: list[int], exact: bool, compat: bool) -> int:
    """Returns the number of ids whose masks differ. compat never trains on id 0."""
    if exact == compat:
        return ids.count(0) if exact else 0
    return len(ids) if exact else len(ids) - ids.count(0)


def _flat(spans: list) -> list[TokenSpan]:
    result: list[TokenSpan] = []
    for each in spans:
        if isinstance(each, TokenSpan):
            result.append(each)
        else:
            result += each
    return result


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    unknown = getattr(tokenizer.model, "unk_token", None)
    return tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None
