"""One dataset `d` of JSONL files, tokenised in a separate folder, for the tests of bad input."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from ftdp_small_tokenizers import small_tokenizer

from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.tokenizing import tokenize_datasets

GOOD = b'[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]'
# Sets all bad lines aside, whatever their share.
SET_ASIDE = {"on_bad_sample": "quarantine", "max_bad_share": 1}


def source_of(folder: Path, name: str = "f.jsonl") -> Path:
    """Returns the path of a source file and creates its folder."""
    source = folder / "in" / "d" / "processed" / "sft" / name
    source.parent.mkdir(parents=True, exist_ok=True)
    return source


def tokenize(folder: Path, **options):
    """Tokenises the dataset with fields of `TokenizeOptions`, and returns its manifest."""
    tokenizer = small_tokenizer("byte_level")
    return tokenize_datasets(folder / "in", folder / "out", tokenizer, TokenizeOptions(**options))["d"]


def quarantined(folder: Path, stem: str = "f") -> list[dict]:
    """Returns the records of a file's quarantine, [] if it has none."""
    path = folder / "out" / "manifests" / "d" / f"{stem}.quarantine.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def bin_of(folder: Path, stem: str = "f") -> bytes:
    """Returns the bytes of the tokenised file."""
    return (folder / "out" / "chatml_llamav13_32k" / "train" / "cn" / "d" / f"{stem}.bin").read_bytes()


def finals(folder: Path) -> list[str]:
    """Returns the output files that could be mistaken for results."""
    out = folder / "out"
    names = [path for path in out.rglob("*") if path.is_file() and "chunks" not in path.parts]
    return sorted(path.relative_to(out).as_posix() for path in names if "quarantine" not in path.name)


def raw_line(record: dict) -> bytes:
    """Returns the line in a record of a quarantine file."""
    return base64.b64decode(record["raw_base64"]) if "raw_base64" in record else record["raw"].encode()
