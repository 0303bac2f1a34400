"""Finds the number of embedding rows that a tokenizer needs, and the tokens that are new to the base model."""

from __future__ import annotations

import json
from pathlib import Path

from snaketune.common.cli import UserError
from snaketune.common.files import read_json, sha256_file


def find_new_tokens(tokenizer_path: str, base_path: str | None) -> tuple[int, list[int]]:
    """Returns (entries of the tokenizer, ids that the base tokenizer does not have).

    An extended tokenizer's manifest lists the added tokens. If there is none, or it does not match tokenizer.json, the
    ids come from a comparison with the base model's tokenizer.json, if it has one.

    Raises:
        UserError: tokenizer.json is missing.
    """
    file = Path(tokenizer_path) / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{file} is missing",
            expected="the folder that extend_tokenizer.py wrote",
            fix="set tokenizer_path to it",
        )
    vocabulary = read_vocabulary(file)
    size = max(vocabulary.values()) + 1
    manifest = file.with_name("manifest.json")
    if manifest.is_file():
        said = read_json(manifest)
        if said.get("tokenizer_sha256") == sha256_file(file):
            return size, sorted(said["added"].values())
    base = Path(base_path or "") / "tokenizer.json"
    if base_path and base.is_file():
        known = read_vocabulary(base)
        return size, sorted(i for token, i in vocabulary.items() if token not in known)
    return size, []


def grown_rows(rows: int, vocab_size: int) -> int:
    """Returns the number of rows after growing for a tokenizer: a multiple of 64, or `rows` if that is enough."""
    return rows if vocab_size <= rows else -(-vocab_size // 64) * 64


def read_vocabulary(tokenizer_json: Path) -> dict[str, int]:
    """Returns token -> id of a tokenizer.json, added tokens included."""
    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    entries = content["model"]["vocab"]
    if isinstance(entries, list):  # Unigram: [[token, score], ...]
        entries = {token: i for i, (token, _) in enumerate(entries)}
    return {**entries, **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}
