"""Tokenises blocks of a chunk in the worker processes, with line numbers of the whole file."""

from __future__ import annotations

from functools import lru_cache

from snaketune.chat_files.line_reader import Block
from snaketune.chat_files.range_reader import lines_before
from snaketune.common.cli import UserError
from snaketune.tokenized.block_tokenizer import BlockTokenizer, TokenizedBlock


class ChunkTokenizer:
    """Wraps a `BlockTokenizer` for chunks that start in the middle of a file."""

    def __init__(self, tokenizer: BlockTokenizer):
        self._tokenizer = tokenizer

    def __call__(self, source: str, block: Block, first_byte: int) -> tuple[int, TokenizedBlock]:
        """Tokenises a block of a chunk that starts at byte `first_byte` of its file.

        Returns:
            The number of lines and the tokenised block.

        Raises:
            UserError: A line is bad. The message names its number in the whole file.
        """
        # The preceding lines are counted only when a line number is needed.
        try:
            result = self._tokenizer(source, block)
        except UserError:
            if not first_byte:
                raise
            return len(block.lines), self._tokenizer(source, _renumbered(source, block, first_byte))
        if result.quarantined and first_byte:
            result = self._tokenizer(source, _renumbered(source, block, first_byte))
        if len(result.lengths) + result.heldout + len(result.quarantined) != len(block.lines):
            raise AssertionError(f"{source}: the results do not account for all {len(block.lines)} lines")
        return len(block.lines), result


@lru_cache(maxsize=1)
def _lines_before(source: str, first_byte: int) -> int:
    return lines_before(source, first_byte)


def _renumbered(source: str, block: Block, first_byte: int) -> Block:
    return block._replace(first_line=block.first_line + _lines_before(source, first_byte))
