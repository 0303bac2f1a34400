"""Sets a seeded share of conversations aside for evaluation: by content, so no duplicate lands on both sides."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from snaketune.chat_files.bad_lines import BadLine, read_conversation
from snaketune.chat_files.line_choice import check_share, is_held_out
from snaketune.chat_files.line_reader import LineReader
from snaketune.chat_files.processed_layout import find_datasets
from snaketune.chat_format.template_file import DEFAULT_TEMPLATE, load_template
from snaketune.common.cli import UserError
from snaketune.common.files import atomic_path, sha256_file, sha256_json, write_json
from snaketune.encoding.batch_encoder import BatchEncoder
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.tokenizer import load_tokenizer
from snaketune.tokenized.job_parts import is_in_batch

# Raises a BadLine for a line that tokenisation refuses.
LineCheck = Callable[[bytes], object]


def line_check(
    encoding: ChatEncoding, max_length: int, tokenizer_path: str | os.PathLike | None = None
) -> LineCheck:
    """Returns what tells a bad line as tokenisation does.

    Args:
        encoding: Of the tokenisation: "exact" reads more of a message's fields than "compat", and control tokens that
            are an "error" make a line that holds one a bad line.
        max_length: Tokens after which a conversation is cut.
        tokenizer_path: Folder of the extended tokenizer, which knows its control tokens.

    Raises:
        UserError: Control tokens are an error and there is no tokenizer.
    """
    if encoding.control_tokens != "error":
        turns = partial(load_template(encoding.template or DEFAULT_TEMPLATE).turns, own_loss=encoding.exact)
    elif tokenizer_path is None:
        raise UserError("which tokens are control tokens is not known", fix="give --tokenizer-path")
    else:
        turns = BatchEncoder(load_tokenizer(tokenizer_path), encoding).turns
    return lambda line: read_conversation(line, turns, max_length)


class HeldoutSplitter:
    """Copies held-out lines to `<output_dir>/<dataset>/processed/...` in the ftdp layout.

    A bad line never is held out: tokenisation stops at it or quarantines it, and counts it there.

    Args:
        processed_dir: Folder of dataset folders.
        output_dir: Receives the lines.
        share: Share of the lines.
        seed: Seed of the choice.
        check: Tells bad lines.

    Raises:
        UserError: The share is out of range, or the folder holds no dataset.
    """

    def __init__(
        self,
        processed_dir: str | os.PathLike,
        output_dir: str | os.PathLike,
        share: float,
        seed: int,
        check: LineCheck,
    ):
        check_share(share)
        self._root, self._output = Path(processed_dir), Path(output_dir)
        self._share, self._seed, self._check = share, seed, check
        self._datasets = find_datasets(processed_dir)

    def write(self, dataset: str, manifest: str | os.PathLike) -> dict[str, Any]:
        """Sets a dataset's lines aside and writes the manifest last; an older manifest is removed first.

        Each source file gives one file of the same path, also when no line of it is set aside.

        Returns:
            The manifest: options, and per file its path, SHA-256 and the counts of lines; `bad` counts those that would
            have been set aside.

        Raises:
            UserError: There is no such dataset.
        """
        if dataset not in self._datasets:
            raise UserError(
                f"{self._root} holds no dataset {dataset!r}",
                found=", ".join(self._datasets),
                fix="correct --dataset",
            )
        Path(manifest).unlink(missing_ok=True)
        with ExitStack() as stack:
            files = [self._split(source, stack) for source in self._datasets[dataset]]
        value = {
            "format": 1,
            "dataset": dataset,
            "options": {"heldout_share": self._share, "heldout_seed": self._seed},
            "files": files,
            "totals": {key: sum(file[key] for file in files) for key in ("lines", "heldout", "bad")},
        }
        write_json(manifest, value)
        return value

    def write_part(
        self, datasets: list[str] | None, part: str, marker: str | os.PathLike
    ) -> dict[str, dict[str, Any]]:
        """Writes the datasets of a part, removes what is there of others, and writes the marker last.

        Args:
            datasets: Names of those to use; None takes all. Their manifests go to `<output_dir>/<dataset>.json`.
            part: Name of a part of `split_datasets`.
            marker: JSON file with the digest of each manifest.

        Returns:
            The manifests by dataset.
        """
        names = [name for name in (datasets or self._datasets) if is_in_batch(name, part)]
        for manifest in sorted(self._output.glob("*.json")):
            name = manifest.name.removesuffix(".json")
            if name not in names and is_in_batch(name, part):
                manifest.unlink()
                shutil.rmtree(self._output / name, ignore_errors=True)
        manifests = {}
        for name in names:
            kept = {
                (self._output / file.relative_to(self._root)).resolve()
                for file in self._datasets.get(name, [])
            }
            for old in (self._output / name).rglob("*.jsonl"):
                if old.resolve() not in kept:
                    old.unlink()
            manifests[name] = self.write(name, self._output / f"{name}.json")
        digests = {name: sha256_json(manifest) for name, manifest in manifests.items()}
        write_json(marker, {"format": 1, "part": part, "datasets": digests})
        return manifests

    def _split(self, source: Path, stack: ExitStack) -> dict[str, Any]:
        """Writes a source's lines to a temporary file, which gets its name when the stack is closed."""
        relative = source.relative_to(self._root)
        temporary = stack.enter_context(atomic_path(self._output / relative))
        lines = held = bad = 0
        with LineReader(source) as reader, open(temporary, "wb") as target:
            for block in reader:
                lines += len(block.lines)
                for line in block.lines:
                    if not is_held_out(line, self._share, self._seed):
                        continue
                    try:
                        self._check(line)
                    except BadLine:
                        bad += 1
                        continue
                    held += 1
                    target.write(line + b"\n")
        return {
            "source": relative.as_posix(),
            "source_sha256": reader.sha256,
            "heldout_sha256": sha256_file(temporary),
            "lines": lines,
            "heldout": held,
            "bad": bad,
        }
