"""Samples of the tokenised data for the report, which colours the trained tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from snaketune.encoding.tokenizer import load_tokenizer
from snaketune.reporting.data_summary import Dataset
from snaketune.tokenized.bin_reader import TokenizedFile
from snaketune.tokenized.compatibility import refuse_other_tokenizer
from snaketune.tokenized.sample_view import Sample, shown

_DATASETS = 4
_TOKENS = 1500


def mask_samples(datasets: list[Dataset], tokenizer_path: Path) -> list[dict[str, Any]]:
    """Returns a sample of each of the largest datasets: in its first file, the closest to the median length.

    Args:
        datasets: The tokenised datasets; their `.bin` files are read.
        tokenizer_path: Folder of the extended tokenizer they were made with.

    Returns:
        Mappings with `dataset`, `bin`, `number`, `tokens`, `trained` (number of trained tokens), `shown`
        (number of tokens shown) and `pieces`: (trained, special, text) from the start of the sample.

    Raises:
        UserError: The files were made with a different tokenizer.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    filled = [dataset for dataset in datasets if dataset.stats["samples"]]
    filled.sort(key=lambda dataset: (-dataset.stats["tokens"], dataset.stats["dataset"]))
    result = []
    for dataset in filled[:_DATASETS]:
        first = next(file for file in dataset.stats["files"] if file["samples"])
        path = Path(dataset.folder) / first["bin"]
        refuse_other_tokenizer(path, dataset.manifest, tokenizer_path, tokenizer.sha256)
        number = int(np.abs(TokenizedFile(path).lengths - dataset.stats["lengths"]["p50"]).argmin())
        sample = Sample(path, number, tokenizer)
        tokens, trained = len(sample.tokens), sum(token.trained for token in sample.tokens)
        sample.tokens = sample.tokens[:_TOKENS]
        result.append(
            {
                "dataset": dataset.stats["dataset"],
                "bin": str(path),
                "number": number,
                "tokens": tokens,
                "trained": trained,
                "shown": len(sample.tokens),
                "pieces": [(*kind, shown(text)) for *kind, text in sample.pieces()],
            }
        )
    return result
