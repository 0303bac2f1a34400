"""Writes tokenised files for the packing tests, without the code under test."""

from __future__ import annotations

import json

import numpy as np


def write_bin(path, samples):
    """Writes lists of stored ids as a `.bin` file with its meta file, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, data = [], b""
    for tokens in samples:
        rows.append((len(data), len(tokens)))
        data += (json.dumps({"tokens": tokens}) + "\n").encode()
    path.write_bytes(data)
    with open(f"{path}.meta", "wb") as file:
        np.save(file, rows)
    return path


def random_samples(rng, count, longest):
    """Returns `count` lists of 1 to `longest` ids, some untrained (negative) or 0."""
    return [[rng.randint(-99, 99) for _ in range(rng.randint(1, longest))] for _ in range(count)]
