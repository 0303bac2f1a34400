"""Held-out conversations as token ids, with the chat template and loss mask that training uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError
from common.files import sha256_file, sha256_json
from ftdp.chat_template import MessageError, refuse_half_characters
from ftdp.encode import BatchEncoder
from ftdp.layout import find_datasets
from ftdp.piece import trained_mask
from ftdp.tokenizer import ExtendedTokenizer

LAYOUT = "<dataset>/processed/<any>/<file>.jsonl"


@dataclass(frozen=True)
class Sample:
    """One held-out conversation.

    Attributes:
        dataset: Name of its dataset folder.
        ids: Token ids, BOS first where the template has one.
        trained: Whether the id at the same place is one that training would learn to predict.
        truncated: Whether the conversation was cut at the maximum length.
    """

    dataset: str
    ids: list[int]
    trained: list[bool]
    truncated: bool

    @property
    def targets(self) -> int:
        """Trained ids that something comes before: `mask: compat` trains on BOS, but nothing can predict it."""
        return sum(self.trained[1:])


def find_files(folder: Path) -> list[tuple[str, Path]]:
    """Returns (dataset, file) of every JSONL file of a folder in the processed layout, sorted.

    Raises:
        UserError: When there is none.
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
    """Returns a SHA-256 over names and contents of the held-out files."""
    return sha256_json([[str(path.relative_to(folder)), sha256_file(path)] for _, path in find_files(folder)])


def load_heldout(
    folder: Path,
    tokenizer: ExtendedTokenizer,
    max_length: int,
    max_samples: int | None = None,
    mask: str = "compat",
    control_tokens: str = "literal",
) -> list[Sample]:
    """Reads and tokenises held-out conversations.

    Args:
        folder: Held-out conversations, `<dataset>/processed/<any>/<file>.jsonl`.
        tokenizer: The extended tokenizer.
        max_length: Tokens after which a conversation is cut.
        max_samples: Conversations per dataset; those whose lines have the smallest SHA-256, so that the choice
            depends neither on the order of the file nor on other lines.
        mask: As in training, see `ftdp.encode.BatchEncoder`.
        control_tokens: As in training.

    Returns:
        The samples, in the order of the files.

    Raises:
        UserError: When there are none, or a line is no conversation.
    """
    lines: dict[str, list[tuple[str, bytes]]] = {}
    for dataset, path in find_files(folder):
        lines.setdefault(dataset, []).extend(_lines(path))
    encoder = BatchEncoder(tokenizer, mask=mask, control_tokens=control_tokens)
    samples = []
    for dataset, places in lines.items():
        if max_samples is not None and len(places) > max_samples:
            chosen = sorted(places, key=lambda place: hashlib.sha256(place[1]).digest())[:max_samples]
            places = [place for place in places if place in chosen]
        conversations = [_parse(where, line) for where, line in places]
        for where, conversation in zip((where for where, _ in places), conversations, strict=True):
            samples.append(_encode(where, dataset, conversation, encoder, mask == "exact", max_length))
    if not any(sample.targets for sample in samples):
        raise UserError(
            f"the held-out conversations in {folder} have no trained token",
            found=f"{len(samples)} conversations",
            expected="assistant messages",
            fix="hold out a larger share, or raise --max-length",
        )
    return samples


def batches_by_length(samples: list[Sample], batch_tokens: int) -> list[list[Sample]]:
    """Groups samples of similar length; a batch, padded to its longest, holds at most `batch_tokens` ids.

    Longest first, so that a lack of memory shows at once. A sample longer than that makes a batch of its own.
    """
    batches: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        if batches and len(batches[-1][0].ids) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line.strip()


def _parse(where: str, line: bytes) -> list[dict]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON", found=error, fix="write one conversation a line") from None


def _encode(
    where: str, dataset: str, conversation: list[dict], encoder: BatchEncoder, exact: bool, max_length: int
) -> Sample:
    try:
        turns = encoder.turns(conversation)
        refuse_half_characters(turns)
    except MessageError as error:
        raise UserError(
            f"{where}: {error.field}", found=error.found, expected=error.expected, fix=error.fix
        ) from None
    (pieces,) = encoder.encode_turns([turns])
    ids = [token for piece in pieces for token in piece.ids]
    trained = trained_mask(pieces, exact, max_length)
    return Sample(dataset, ids[:max_length], trained, len(ids) > max_length)
