"""Held-out conversations as token ids, with the chat template and loss mask of training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from snaketune.chat_files.processed_layout import find_datasets
from snaketune.chat_format.chat_template import MessageError, Turn, refuse_half_characters
from snaketune.common.cli import UserError
from snaketune.common.files import sha256_file, sha256_json
from snaketune.encoding.batch_encoder import BatchEncoder
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.signed_ids import trained_mask
from snaketune.encoding.tokenizer import ExtendedTokenizer

LAYOUT = "<dataset>/processed/<any>/<file>.jsonl"


@dataclass(frozen=True)
class Sample:
    """One held-out conversation.

    Attributes:
        dataset: Name of its dataset folder.
        ids: Token ids, starting with BOS if the template has one.
        trained: One bool per id: True if training learns to predict it.
        truncated: True if the conversation was cut at the maximum length.
    """

    dataset: str
    ids: list[int]
    trained: list[bool]
    truncated: bool

    @property
    def targets(self) -> int:
        """Number of trained ids after the first: `mask: compat` trains on BOS, but nothing can predict it."""
        return sum(self.trained[1:])


class HeldoutLine(NamedTuple):
    """A line of a held-out file: dataset, file, number from 1, and bytes without surrounding white space."""

    dataset: str
    path: Path
    number: int
    text: bytes

    @property
    def sha256(self) -> str:
        """Digest of the bytes."""
        return hashlib.sha256(self.text).hexdigest()


def find_files(folder: Path) -> list[tuple[str, Path]]:
    """Returns (dataset, file) of every JSONL file in a folder of the processed layout, sorted.

    Raises:
        UserError: There are none.
    """
    try:
        datasets = find_datasets(folder)
    except UserError as error:
        raise UserError(
            f"no held-out conversations in {folder}",
            found=str(error).splitlines()[0],
            expected=f"files {folder}/{LAYOUT}",
            fix="set heldout.share above 0, or heldout.processed_dir to a folder in this layout",
        ) from None
    return [(name, path) for name, files in datasets.items() for path in files]


def heldout_digest(folder: Path) -> str:
    """Returns a SHA-256 of the names and contents of the held-out files."""
    return sha256_json([[str(path.relative_to(folder)), sha256_file(path)] for _, path in find_files(folder)])


def read_lines(folder: Path, max_samples: int | None = None) -> list[HeldoutLine]:
    """Returns the non-blank lines of all held-out files, in order.

    Args:
        folder: Held-out conversations, `<dataset>/processed/<any>/<file>.jsonl`.
        max_samples: Maximum lines per dataset. Those with the smallest SHA-256 are kept, so that the choice
            depends neither on the order of the lines nor on other lines.

    Raises:
        UserError: There are none.
    """
    lines: dict[str, list[HeldoutLine]] = {}
    for dataset, path in find_files(folder):
        with open(path, "rb") as file:
            lines.setdefault(dataset, []).extend(
                HeldoutLine(dataset, path, number, line.strip())
                for number, line in enumerate(file, 1)
                if line.strip()
            )
    result = []
    for own in lines.values():
        if max_samples is not None and len(own) > max_samples:
            chosen = set(sorted(own, key=lambda line: line.sha256)[:max_samples])
            own = [line for line in own if line in chosen]
        result += own
    return result


def parse_line(line: HeldoutLine, encoder: BatchEncoder) -> tuple[list[dict], list[Turn]]:
    """Returns the messages of a line, and those messages as turns of the encoder's chat template.

    Raises:
        UserError: The line is not a conversation.
    """
    where = f"{line.path}:{line.number}"
    try:
        messages = json.loads(line.text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON", found=error, fix="write one conversation per line") from None
    try:
        turns = encoder.turns(messages)
        refuse_half_characters(turns)
    except MessageError as error:
        raise UserError(
            f"{where}: invalid {error.field}", found=error.found, expected=error.expected, fix=error.fix
        ) from None
    return messages, turns


def load_heldout(
    folder: Path,
    tokenizer: ExtendedTokenizer,
    encoding: ChatEncoding,
    max_length: int,
    max_samples: int | None = None,
) -> list[Sample]:
    """Reads and tokenises held-out conversations.

    Args:
        folder: Held-out conversations, `<dataset>/processed/<any>/<file>.jsonl`.
        tokenizer: The extended tokenizer.
        encoding: As in training.
        max_length: Maximum tokens of a conversation; longer ones are cut.
        max_samples: Maximum conversations per dataset, chosen as in `read_lines`.

    Returns:
        The samples, in the order of the files.

    Raises:
        UserError: There are none, or a line is not a conversation.
    """
    encoder = BatchEncoder(tokenizer, encoding)
    samples = [
        _encode(line.dataset, parse_line(line, encoder)[1], encoder, max_length)
        for line in read_lines(folder, max_samples)
    ]
    if not any(sample.targets for sample in samples):
        raise UserError(
            f"the held-out conversations in {folder} have no trained token",
            found=f"{len(samples)} conversations",
            expected="assistant messages",
            fix="hold out a larger share, or raise --max-length",
        )
    return samples


def batches_by_length(samples: list[Sample], batch_tokens: int) -> list[list[Sample]]:
    """Groups samples of similar length into batches of at most `batch_tokens` ids, padding included.

    Longest first, so that running out of memory shows at once. A sample longer than `batch_tokens` is its own
    batch.
    """
    batches: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        if batches and len(batches[-1][0].ids) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def _encode(dataset: str, turns: list[Turn], encoder: BatchEncoder, max_length: int) -> Sample:
    (pieces,) = encoder.encode_turns([turns])
    ids = [token for piece in pieces for token in piece.ids]
    trained = trained_mask(pieces, encoder.encoding.exact, max_length)
    return Sample(dataset, ids[:max_length], trained, len(ids) > max_length)
