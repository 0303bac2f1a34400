"""Tokenises one block of JSONL lines into the bytes of a `.bin` file. Runs in the worker processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from snaketune.chat_files.bad_lines import BadLine, read_conversation
from snaketune.chat_files.line_choice import is_held_out, is_valid
from snaketune.chat_files.line_reader import Block
from snaketune.chat_format.chat_template import Turn
from snaketune.encoding.batch_encoder import BatchEncoder
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.signed_ids import TokenSpan
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.settings.command_line import defaults_of

_DEFAULTS = defaults_of("tokenize_dataset")


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions(ChatEncoding):
    """The options that decide the tokenised bytes, and the handling of bad lines.

    Attributes:
        max_length: Tokens after which a conversation is cut.
        heldout_share: Share of the lines that split_heldout.py sets aside.
        heldout_seed: Seed of that choice.
        valid: "copy" copies every 100th document, "holdout" moves a seeded share.
        valid_share: Share for "holdout".
        valid_seed: Seed for "holdout".
        on_bad_sample: "stop" at the first bad line, or "quarantine" it and continue.
        max_bad_share: Share of bad lines in a file above which the job fails despite "quarantine".
    """

    template: str = _DEFAULTS["template"]
    max_length: int = _DEFAULTS["max_length"]
    heldout_share: float = _DEFAULTS["heldout_share"]
    heldout_seed: int = _DEFAULTS["heldout_seed"]
    valid: str = _DEFAULTS["valid"]
    valid_share: float = _DEFAULTS["valid_share"]
    valid_seed: int = _DEFAULTS["valid_seed"]
    on_bad_sample: str = _DEFAULTS["on_bad_sample"]
    max_bad_share: float = _DEFAULTS["max_bad_share"]


@dataclass
class TokenizedBlock:
    """The lines of a block, as written to the `.bin` file.

    Attributes:
        data: The joined lines.
        line_bytes: int64 array (documents,), bytes of each line.
        lengths: int64 array (documents,), tokens of each line.
        heldout: Number of held-out conversations.
        trained_tokens: Number of trained tokens.
        truncated: Number of conversations that were cut.
        untrained: Number of those that lost all their trained tokens by the cut.
        source_bytes: Bytes of the block in the JSONL file.
        counts: Other counts: quarantined, and those of the encoder (`BatchEncoder.take_counts`).
        quarantined: Bad lines: line number, unchanged line without its line break, reason.
        for_valid: bool array (documents,), True if `valid: holdout` moves the document to the valid folder.
        lines: int64 array (documents,), the line of each document in the block, from 0.
    """

    data: bytes
    line_bytes: np.ndarray
    lengths: np.ndarray
    heldout: int
    trained_tokens: int
    truncated: int
    untrained: int
    source_bytes: int
    counts: dict[str, int] = field(default_factory=dict)
    quarantined: list[tuple[int, bytes, str]] = field(default_factory=list)
    for_valid: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    lines: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class _Kept(NamedTuple):
    """A source line that holds a conversation."""

    number: int
    line: bytes
    conversation: list[Turn]


class _Line(NamedTuple):
    """A line of a `.bin` file and its number of tokens. `untrained`: it lost all its trained tokens by the cut."""

    data: bytes
    tokens: int
    truncated: bool
    untrained: bool


class BlockTokenizer:
    """Tokenises blocks, with one tokenizer call per block.

    Args:
        tokenizer: The extended tokenizer.
        options: Options that decide the bytes and the handling of bad lines.
    """

    def __init__(self, tokenizer: ExtendedTokenizer, options: TokenizeOptions):
        self._encoder = BatchEncoder(tokenizer, options, many=True)
        self._options = options

    def __call__(self, source: str, block: Block) -> TokenizedBlock:
        """Tokenises a block.

        Args:
            source: Name of the JSONL file, for messages.
            block: Its lines.

        Raises:
            UserError: A line is bad and `on_bad_sample` is "stop". The message names file, line and field.
        """
        bad: list[tuple[int, bytes, str]] = []
        kept, heldout = self._read(source, block, bad)
        lines = self._lines([each.conversation for each in kept])
        data = b"".join([line.data for line in lines])
        return TokenizedBlock(
            data,
            np.array([len(line.data) for line in lines], dtype=np.int64),
            np.array([line.tokens for line in lines], dtype=np.int64),
            heldout,
            sum(line.tokens for line in lines) - _count_untrained(data),
            sum(line.truncated for line in lines),
            sum(line.untrained for line in lines),
            block.size,
            counts=self._encoder.take_counts() | {"quarantined": len(bad)},
            quarantined=bad,
            for_valid=self._for_valid(kept),
            lines=np.array([each.number for each in kept], dtype=np.int64) - block.first_line,
        )

    def _lines(self, conversations: list[list[Turn]]) -> list[_Line]:
        """Returns the line of each conversation."""
        encoder, max_length = self._encoder, self._options.max_length
        straight = list(map(encoder.line, conversations))
        others = [turns for turns, line in zip(conversations, straight, strict=True) if line is None]
        encoded = iter(encoder.encode_turns(others))
        # `encode_turns` counts control tokens itself.
        encoder.count_control_tokens(
            turn
            for turns, line in zip(conversations, straight, strict=True)
            if line is not None
            for turn in turns
        )
        return [
            _line_of_pieces(next(encoded), max_length, self._options.exact)
            if line is None
            else _line(line, line.count(b",") + 1, max_length)
            for line in straight
        ]

    def _read(self, source: str, block: Block, bad: list[tuple[int, bytes, str]]) -> tuple[list[_Kept], int]:
        """Returns the conversations to encode and the number held out. A bad line is never held out."""
        options = self._options
        kept: list[_Kept] = []
        heldout = 0
        last = block.first_line + len(block.lines) - 1
        for number, line in enumerate(block.lines, block.first_line):
            try:
                cut_off = block.open_end and number == last
                conversation = read_conversation(line, self._encoder.turns, options.max_length, cut_off)
            except BadLine as error:
                self._set_aside(error, source, number, line, bad)
                continue
            if options.heldout_share and is_held_out(line, options.heldout_share, options.heldout_seed):
                heldout += 1
            else:
                kept.append(_Kept(number, line, conversation))
        return kept, heldout

    def _set_aside(
        self, error: BadLine, source: str, number: int, line: bytes, bad: list[tuple[int, bytes, str]]
    ) -> None:
        if self._options.on_bad_sample != "quarantine":
            raise error.at(f"{source}:{number}") from None
        bad.append((number, line, str(error)))

    def _for_valid(self, kept: list[_Kept]) -> np.ndarray:
        options = self._options
        if options.valid != "holdout":
            return np.zeros(len(kept), dtype=bool)
        chosen = (is_valid(each.line, options.valid_share, options.valid_seed) for each in kept)
        return np.fromiter(chosen, dtype=bool, count=len(kept))


def _line(data: bytes, tokens: int, max_length: int) -> _Line:
    """Wraps a whole line of `tokens` ids, cut if it is too long."""
    if tokens <= max_length:
        return _Line(data, tokens, False, False)
    cut = b", ".join(data.split(b", ", max_length)[:max_length]) + b"]}\n"
    return _Line(cut, max_length, True, _is_trained(data) and not _is_trained(cut))


def _is_trained(line: bytes) -> bool:
    """True if any id after the first is trained on. The first is BOS, which `compat` marks and nothing predicts."""
    _, _, others = line.partition(b",")
    return bool(others) and others.count(b",") + 1 > _count_untrained(others)


def _count_untrained(data: bytes) -> int:
    """Returns how many ids in `.bin` lines are untrained: negative ones and 0, but not -0."""
    zeros = data.count(b" 0,") + data.count(b" 0]") + data.count(b"[0")
    return data.count(b"-") - data.count(b"-0") + zeros


def _line_of_pieces(spans: list[TokenSpan], max_length: int, exact: bool) -> _Line:
    data = b", ".join(filter(None, [span.write(exact) for span in spans]))
    return _line(b'{"tokens": [' + data + b"]}\n", sum(len(span.ids) for span in spans), max_length)
