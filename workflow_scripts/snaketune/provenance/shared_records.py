"""The records that runs share: tokenizers, tokenised data and pack plans."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from snaketune.common import result_paths as names
from snaketune.common.files import read_json, sha256_json
from snaketune.provenance.record import Check, Record, file_check, joined
from snaketune.tokenized.layout import INDEX_FILE, meta_path
from snaketune.tokenized.manifests import read_index, read_manifest


@cache
def tokenizer_of(results: Path, digest: str) -> Record:
    for path in sorted(results.glob(f"{names.TOKENIZER.format(tokenizer='*')}/{names.MANIFEST}")):
        if read_json(path)["tokenizer_sha256"] == digest:
            return tokenizer_record(path.parent)
    return Record("tokenizer", None, [("sha256", digest), ("folder", "gone")])


@cache
def tokenizer_record(folder: Path) -> Record:
    manifest = read_json(folder / names.MANIFEST)
    facts = [
        ("sha256", manifest["tokenizer_sha256"]),
        ("base", manifest["base_sha256"]),
        ("ids", manifest["vocab_size"]),
        ("chat template", f"{manifest['chat_template']['name']} {manifest['chat_template']['sha256'][:12]}"),
    ]
    return Record(
        "tokenizer", folder, facts, [file_check(folder / "tokenizer.json", manifest["tokenizer_sha256"])]
    )


@cache
def plan_record(folder: Path) -> Record:
    manifest = read_json(folder / Path(names.PACK_PLAN).name)
    totals = manifest["totals"]
    facts = [
        ("plan_sha256", manifest["plan_sha256"]),
        (
            "rows",
            f"{totals['rows']:,} of {manifest['max_length']:,} tokens, {manifest['mode']}, seed {manifest['seed']}",
        ),
        ("tokens", f"{totals['packed_tokens']:,} of {totals['tokens']:,}"),
        *([("weights", joined(manifest["weights"]))] if "weights" in manifest else []),
    ]
    processed = manifest["processed_dir"]
    processed = Path(os.path.normpath(folder / processed)) if processed else None
    check = Check(f"{folder} (pack plan)", manifest["plan_sha256"], lambda: _plan_digest(folder))
    return Record("pack plan", folder, facts, [check], [data_record(folder.parent.parent, processed)])


def _plan_digest(folder: Path) -> str:
    from snaketune.packing.pack_plan import open_plan

    return open_plan(folder).sha256()


@cache
def data_record(folder: Path, processed: Path | None) -> Record:
    record = Record("tokenised data", folder)
    for path, digest in read_index(folder / INDEX_FILE).items():
        manifest = read_manifest(path)
        totals, options = manifest["totals"], manifest["options"]
        facts = [
            (
                "lines",
                f"{totals['lines']:,}: {totals['samples']:,} train, {totals['valid_samples']:,} valid, "
                f"{totals['heldout']:,} held out, {totals['quarantined']:,} bad",
            ),
            ("tokens", f"{totals['tokens']:,}, {totals['trained_tokens']:,} of them trained on"),
            ("template, mask", f"{options['template']}, {options['mask']}"),
        ]
        dataset = Record(f"dataset {manifest['dataset']}", path, facts)
        dataset.checks.append(
            Check(f"{path} (manifest)", digest, lambda path=path: sha256_json(read_json(path)))
        )
        for file in manifest["files"]:
            dataset.sources.append(_shard(folder, processed, file))
        record.sources.append(dataset)
    return record


def _shard(folder: Path, processed: Path | None, file: dict[str, Any]) -> Record:
    source = Record(
        "JSONL file",
        processed / file["source"] if processed else None,
        [
            ("lines", f"{file['lines']:,}"),
            ("bytes", f"{file['source_bytes']:,}"),
            ("sha256", file["source_sha256"]),
        ],
    )
    if source.path:
        source.checks.append(file_check(source.path, file["source_sha256"]))
    else:
        source.facts.insert(0, ("name", file["source"]))
    if not file.get("bin"):
        return source
    path = folder / file["bin"]
    facts = [
        ("samples", f"{file['samples']:,}"),
        ("tokens", f"{file['tokens']:,}"),
        ("sha256", file["bin_sha256"]),
    ]
    checks = [
        file_check(path, file["bin_sha256"]),
        file_check(meta_path(path), file["meta_sha256"]),
    ]
    return Record("tokenised shard", path, facts, checks, [source])
