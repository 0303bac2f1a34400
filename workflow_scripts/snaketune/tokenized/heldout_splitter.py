"""Sets aside a seeded share of conversations for evaluation, by content, so duplicates stay on one side."""

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
from snaketune.chat_format.template_file import load_template
from snaketune.common.cli import UserError
from snaketune.common.files import atomic_path, sha256_file, sha256_json, write_json
from snaketune.encoding.batch_encoder import BatchEncoder
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.tokenizer import load_tokenizer
from snaketune.settings.schema import default_of
from snaketune.tokenized.job_parts import is_in_batch

# Raises BadLine for a line that tokenisation rejects.
LineCheck = Callable[[bytes], object]


def line_check(
    encoding: ChatEncoding, max_length: int, tokenizer_path: str | os.PathLike | None = None
) -> LineCheck:
    """Returns a function that finds the same bad lines as tokenisation.

    Args:
        encoding: Encoding of the tokenisation. "exact" reads more of a message's fields than "compat"; with
            `control_tokens` "error", a line that contains a control token is bad.
        max_length: Tokens after which a conversation is cut.
        tokenizer_path: Folder of the extended tokenizer, for its control tokens.

    Raises:
        UserError: `control_tokens` is "error" and no tokenizer is given.
    """
    if encoding.control_tokens != "error":
        turns = partial(
            load_template(encoding.template or default_of("tokenize.template")).turns, own_loss=encoding.exact
        )
    elif tokenizer_path is None:
        raise UserError("the control tokens are unknown without a tokenizer", fix="pass --tokenizer-path")
    else:
        turns = BatchEncoder(load_tokenizer(tokenizer_path), encoding).turns
    return lambda line: read_conversation(line, turns, max_length)


class HeldoutSplitter:
    """Copies held-out lines to `<output_dir>/<dataset>/processed/...` in the ftdp layout.

    A bad line is never held out. Tokenisation stops at it, or quarantines and counts it.

    Args:
        processed_dir: Folder of dataset folders.
        output_dir: Receives the lines.
        share: Share of the lines.
        seed: Seed of the choice.
        check: Raises BadLine for a bad line.

    Raises:
        UserError: The share is out of range, or the folder has no dataset.
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
        """Sets aside lines of a dataset. Removes the old manifest first and writes the new one last.

        Each source file gives one file with the same path, even if none of its lines is set aside.

        Returns:
            The manifest: options, and for each file its path, SHA-256 and line counts. `bad` counts the bad
            lines that would have been set aside.

        Raises:
            UserError: The dataset does not exist.
        """
        if dataset not in self._datasets:
            raise UserError(
                f"{self._root} has no dataset {dataset!r}",
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
        """Writes the datasets of a part, removes the part's old datasets, and writes the marker last.

        Args:
            datasets: Names of the datasets to use; None uses all. Manifests go to
                `<output_dir>/<dataset>.json`.
            part: Name of a part from `split_datasets`.
            marker: JSON file for the digest of each manifest.

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
        """Writes a source's lines to a temporary file, which is renamed when the stack closes."""
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
