"""How often each document is seen per epoch when datasets have weights.

A dataset of n documents with weight w contributes t = floor(w * n + 1/2) documents per epoch: it repeats each
document floor(t / n) times, and t mod n of them once more. A hash of the seed, the file name and the
document's number chooses those. So the documents chosen at weight 0.3 are among those chosen at 0.5, and
adding a file changes few choices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from snaketune.tokenized.layout import dataset_of


def copies_per_epoch(
    file: np.ndarray, sample: np.ndarray, names: Sequence[str], weights: Mapping[str, float], seed: int
) -> np.ndarray:
    """Returns how often each document is seen per epoch: int64 (documents,).

    Args:
        file: int64 (documents,), the index of each document's file in `names`.
        sample: int64 (documents,), the document's number in its file.
        names: File names.
        weights: Weights by dataset name, 0 or more. Datasets that are not listed have weight 1.
        seed: Seed of the choice.
    """
    copies = np.ones(len(file), dtype=np.int64)
    datasets = np.array([dataset_of(name) for name in names])
    for dataset, weight in weights.items():
        mine = np.flatnonzero((datasets == dataset)[file])
        if not len(mine):
            continue
        each, more = divmod(int(Fraction(str(weight)) * len(mine) + Fraction(1, 2)), len(mine))
        copies[mine] = each
        if more:
            copies[mine[np.argsort(_ranks(file[mine], sample[mine], names, seed), kind="stable")[:more]]] += 1
    return copies


def scatter(values: np.ndarray) -> np.ndarray:
    """Hashes int64 values to uint64 with the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    bits = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def _ranks(file: np.ndarray, sample: np.ndarray, names: Sequence[str], seed: int) -> np.ndarray:
    digests = [hashlib.sha256(f"{seed} {name}".encode()).digest()[:8] for name in names]
    begins = np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)
    return scatter(begins[file] + sample.astype(np.uint64))
