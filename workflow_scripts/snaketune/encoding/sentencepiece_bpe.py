"""Builds a tokenizer.json from a SentencePiece BPE `tokenizer.model`, without sentencepiece or transformers.

The result equals transformers 4.48's `LlamaTokenizerFast` for the same file with `legacy: true`, the tokenizer of
XTuner 0.2.0 runs: a "▁" before each stretch of text between special tokens, spaces replaced by "▁", no pre-tokenizer,
byte fallback. transformers 5 builds a different tokenizer, so it is not used here.

The file is a protobuf message `ModelProto` (sentencepiece_model.proto of google/sentencepiece). We need only the pieces
and a few settings, so a small reader of the wire format is enough.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from snaketune.common.cli import UserError

# Values of the enums SentencePiece.Type and TrainerSpec.ModelType.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_MODEL_BPE = 2


class Piece(NamedTuple):
    text: str
    score: float
    type: int


class SentencePieceModel(NamedTuple):
    """The parts of a `tokenizer.model` that we need."""

    pieces: list[Piece]
    is_bpe: bool
    add_dummy_prefix: bool
    has_normalization: bool

    def text_of(self, piece_type: int) -> list[str]:
        return [piece.text for piece in self.pieces if piece.type == piece_type]


def read_model(path: str | os.PathLike) -> SentencePieceModel:
    """Reads a SentencePiece `tokenizer.model`.

    Raises:
        UserError: The file is not a SentencePiece model.
    """
    path = Path(path)
    try:
        pieces, trainer, normalizer = [], {}, {}
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                fields = dict(_fields(value))
                score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
                pieces.append(Piece(fields[1].decode(), score, fields.get(3, _NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        if not pieces:
            raise ValueError("no pieces")
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error) as error:
        raise UserError(
            f"{path} is not a SentencePiece model",
            found=f"{error} ({path.stat().st_size} bytes)",
            expected="a serialised ModelProto",
            fix="copy the file again (a file of a few hundred bytes is usually a Git LFS pointer)",
        ) from None
    return SentencePieceModel(
        pieces,
        is_bpe=trainer.get(3, 1) == _MODEL_BPE,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        has_normalization=bool(normalizer.get(2)),
    )


def build_tokenizer_json(model_path: str | os.PathLike) -> Tokenizer:
    """Builds the tokenizer of a SentencePiece BPE model. Its `.save()` or `.to_str()` gives the tokenizer.json.

    Args:
        model_path: The `tokenizer.model`.

    Raises:
        UserError: The file is not a SentencePiece BPE model.
    """
    model = read_model(model_path)
    if not model.is_bpe:
        raise UserError(
            f"{model_path} is not a BPE model",
            found="a SentencePiece model of type Unigram, word or char",
            expected="a BPE model",
            fix="pass a folder with a tokenizer.json",
        )
    if model.has_normalization:
        warnings.warn(
            f"{model_path} normalises text (NFKC or its own rules); we skip this, like transformers' LlamaTokenizer",
            stacklevel=2,
        )
    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    unknown = (model.text_of(_UNKNOWN) or [None])[0]
    tokenizer = Tokenizer(
        BPE(
            ids,
            _merges(model.pieces, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(piece.type == _BYTE for piece in model.pieces),
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    steps = [normalizers.Prepend("▁"), spaces] if model.add_dummy_prefix else [spaces]
    tokenizer.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(content=" ", left=1)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, special=piece.type != _USER_DEFINED, normalized=False)
            for piece in model.pieces
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    bos = "<s>"
    if bos in model.text_of(_CONTROL):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids[bos])]
        )
    return tokenizer


def _merges(pieces: list[Piece], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Returns the BPE merges that the pieces imply, best first.

    SentencePiece stores no merges. Any two pieces may merge if their concatenation is a piece, whose score ranks the
    merge. As in transformers, ties go to the longer left part, then to the smaller ids.
    """
    ranked = []
    for index, (text, score, piece_type) in enumerate(pieces):
        if piece_type in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((-score, -len(left), -len(right), index, ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (field number, value) for each field of a protobuf message: int for varints, bytes for the rest."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if position + size > len(data):
            raise ValueError("the file ends inside a field")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
