"""Sets a seeded share of conversations aside for evaluation: by content, so no duplicate lands on both sides."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import atomic_path, sha256_file, sha256_json, write_json
from ftdp.bad_lines import BadLine, read_conversation
from ftdp.chat_template import MAX_LENGTH
from ftdp.encode import BatchEncoder
from ftdp.layout import find_datasets
from ftdp.planning import is_in_batch
from ftdp.reading import LineReader
from ftdp.template_file import load_template
from ftdp.tokenizer import load_tokenizer

# Raises a BadLine for a line that tokenisation refuses.
LineCheck = Callable[[bytes], object]


def is_held_out(line: bytes, share: float, seed: int) -> bool:
    """Is this line of a JSONL file set aside?

    A line is, when the first 8 bytes of SHA-256 of `<seed>:<line>`, read as a fraction, are less than `share`.

    Args:
        line: The line's bytes; line breaks at its end do not count.
        share: Between 0 and 1.
        seed: Another seed sets other lines aside.
    """
    return share > 0 and _fraction(b"%d:" % seed, line) < share


def is_valid(line: bytes, share: float, seed: int) -> bool:
    """Does `valid: holdout` move this line to the valid folder?

    Decided as by `is_held_out`, over `valid:<seed>:<line>`: with equal seeds, too, the two choices are independent.
    """
    return _fraction(b"valid:%d:" % seed, line) < share


def _fraction(salt: bytes, line: bytes) -> float:
    return int.from_bytes(hashlib.sha256(salt + line.rstrip(b"\r\n")).digest()[:8], "big") / 2**64


def check_share(share: float, name: str = "held-out") -> None:
    """Raises a UserError unless 0 <= share < 1."""
    if not 0 <= share < 1:
        raise UserError(
            f"the {name} share is out of range", found=share, expected="0 <= share < 1", fix="use 0.05"
        )


def line_check(
    template: str = "internlm2_chat",
    max_length: int = MAX_LENGTH,
    mask: str = "compat",
    control_tokens: str = "literal",
    tokenizer_path: str | os.PathLike | None = None,
) -> LineCheck:
    """Returns what tells a bad line as tokenisation with these options does.

    Args:
        template: Name or file of the chat template.
        max_length: Tokens after which a conversation is cut.
        mask: "exact" reads more of a message's fields than "compat".
        control_tokens: "error" makes a line that holds one a bad line.
        tokenizer_path: Folder of the extended tokenizer, which knows its control tokens.

    Raises:
        UserError: `control_tokens` is "error" and there is no tokenizer.
    """
    if control_tokens != "error":
        turns = partial(load_template(template).turns, own_loss=mask == "exact")
    elif tokenizer_path is None:
        raise UserError("which tokens are control tokens is not known", fix="give --tokenizer-path")
    else:
        tokenizer = load_tokenizer(tokenizer_path)
        turns = BatchEncoder(tokenizer, template=template, mask=mask, control_tokens=control_tokens).turns
    return lambda line: read_conversation(line, turns, max_length)


def held_out_lines(path: str | os.PathLike, share: float, seed: int) -> Iterator[bytes]:
    """Yields the lines of a JSONL file that are set aside, without line breaks."""
    with LineReader(path) as reader:
        for block in reader:
            for line in block.lines:
                if is_held_out(line, share, seed):
                    yield line


def split_heldout(
    processed_dir: str | os.PathLike,
    dataset: str,
    output_dir: str | os.PathLike,
    share: float,
    seed: int,
    check: LineCheck | None = None,
    found: dict[str, list[Path]] | None = None,
) -> dict[str, Any]:
    """Copies a dataset's held-out lines to `<output_dir>/<dataset>/processed/...` in the ftdp layout.

    Each source file gives one file of the same path, also when no line of it is set aside. A bad line never is:
    tokenisation stops at it or quarantines it, and counts it there.

    Args:
        processed_dir: Folder of dataset folders.
        dataset: Name of one.
        output_dir: Receives the lines.
        share: Share of the lines.
        seed: Seed of the choice.
        check: Tells bad lines; by default `line_check()`.
        found: What `find_datasets` returned, where that is known.

    Returns:
        The manifest: options, and per file its path, SHA-256 and the counts of lines; `bad` counts those that would have
        been set aside.

    Raises:
        UserError: There is no such dataset, or the share is out of range.
    """
    check_share(share)
    root, output = Path(processed_dir), Path(output_dir)
    datasets = found or find_datasets(root)
    if dataset not in datasets:
        raise UserError(
            f"{root} holds no dataset {dataset!r}", found=", ".join(datasets), fix="correct --dataset"
        )
    check = check or line_check()
    files = []
    with ExitStack() as stack:
        for source in datasets[dataset]:
            relative = source.relative_to(root)
            temporary = stack.enter_context(atomic_path(output / relative))
            lines = held = bad = 0
            with LineReader(source) as reader, open(temporary, "wb") as target:
                for block in reader:
                    lines += len(block.lines)
                    for line in block.lines:
                        if not is_held_out(line, share, seed):
                            continue
                        try:
                            check(line)
                        except BadLine:
                            bad += 1
                            continue
                        held += 1
                        target.write(line + b"\n")
            files.append(
                {
                    "source": relative.as_posix(),
                    "source_sha256": reader.sha256,
                    "heldout_sha256": sha256_file(temporary),
                    "lines": lines,
                    "heldout": held,
                    "bad": bad,
                }
            )
    return {
        "format": 1,
        "dataset": dataset,
        "options": {"heldout_share": share, "heldout_seed": seed},
        "files": files,
        "totals": {key: sum(file[key] for file in files) for key in ("lines", "heldout", "bad")},
    }


def write_heldout_part(
    processed_dir: str | os.PathLike,
    datasets: list[str] | None,
    output_dir: str | os.PathLike,
    part: str,
    marker: str | os.PathLike,
    share: float,
    seed: int,
    check: LineCheck | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs `write_heldout` for the datasets of a part, removes what is there of others, and writes the marker last.

    Args:
        processed_dir: Folder of dataset folders.
        datasets: Names of those to use; None takes all.
        output_dir: Receives the lines, and the manifests as `<dataset>.json`.
        part: Name of a part of `plan_datasets`.
        marker: JSON file with the digest of each manifest.
        share: Share of the lines.
        seed: Seed of the choice.
        check: Tells bad lines.

    Returns:
        The manifests by dataset.
    """
    found = find_datasets(processed_dir)
    names = [name for name in (datasets or found) if is_in_batch(name, part)]
    output = Path(output_dir)
    for manifest in sorted(output.glob("*.json")):
        name = manifest.name.removesuffix(".json")
        if name not in names and is_in_batch(name, part):
            manifest.unlink()
            shutil.rmtree(output / name, ignore_errors=True)
    manifests = {}
    for name in names:
        kept = {(output / file.relative_to(processed_dir)).resolve() for file in found.get(name, [])}
        for old in (output / name).rglob("*.jsonl"):
            if old.resolve() not in kept:
                old.unlink()
        manifests[name] = write_heldout(
            processed_dir, name, output, output / f"{name}.json", share, seed, check, found
        )
    write_json(
        marker, {"format": 1, "part": part, "datasets": {k: sha256_json(v) for k, v in manifests.items()}}
    )
    return manifests


def write_heldout(
    processed_dir: str | os.PathLike,
    dataset: str,
    output_dir: str | os.PathLike,
    manifest: str | os.PathLike,
    share: float,
    seed: int,
    check: LineCheck | None = None,
    found: dict[str, list[Path]] | None = None,
) -> dict[str, Any]:
    """Runs `split_heldout` and writes its manifest last; an older manifest is removed first."""
    Path(manifest).unlink(missing_ok=True)
    value = split_heldout(processed_dir, dataset, output_dir, share, seed, check, found)
    write_json(manifest, value)
    return value
