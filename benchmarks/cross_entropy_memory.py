"""Measures peak memory and time of a model's head and loss, forward and backward: whole or chunked logits.

Each way runs in a separate process, on the same numbers, in fp32 on the CPU. Memory is the process's peak
minus its memory before the head runs. `head again` is for heads that are not a plain linear layer: chunked,
with the head run twice.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "workflow_scripts"))

WAYS = ("whole", "chunked", "head again")


def measure(way: str, tokens: int, vocabulary: int, hidden_size: int, repeats: int, answer) -> None:
    """Puts loss, gradient norm, peak MiB and best seconds of one way into the queue."""
    import torch
    from torch.nn.functional import cross_entropy, linear

    from snaketune.models.cross_entropy import chunked_cross_entropy, linear_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden_size) * 0.05).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    ways = {
        "whole": lambda: cross_entropy(linear(hidden, weight).float(), targets),
        "chunked": lambda: linear_cross_entropy(hidden, weight, None, targets) / tokens,
        "head again": lambda: (
            chunked_cross_entropy(hidden, targets, vocabulary, lambda rows: linear(rows, weight)) / tokens
        ),
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        loss = ways[way]()
        loss.backward()
        seconds.append(time.perf_counter() - start)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    norm = float(torch.stack([hidden.grad.double().norm(), weight.grad.double().norm()]).norm())
    answer.put({"loss": loss.item(), "norm": norm, "peak": peak, "seconds": min(seconds)})


def main() -> None:
    """Prints one line per way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--tokens", type=int, default=8192, help="trained tokens per packed sequence (default: 8192)"
    )
    parser.add_argument("--vocabulary", type=int, default=49152, help="rows of the head (default: 49152)")
    parser.add_argument("--hidden-size", type=int, default=576, help="columns of the head (default: 576)")
    parser.add_argument("--repeats", type=int, default=1, help="runs; the fastest counts (default: 1)")
    a = parser.parse_args()
    print(f"{a.tokens} tokens, vocabulary {a.vocabulary}, hidden size {a.hidden_size}, fp32")
    print(f"{'way':12} {'peak MiB':>9} {'seconds':>8} {'loss':>12} {'gradient norm':>14}")
    context = multiprocessing.get_context("spawn")
    for way in WAYS:
        answer = context.Queue()
        process = context.Process(
            target=measure, args=(way, a.tokens, a.vocabulary, a.hidden_size, a.repeats, answer)
        )
        process.start()
        found = answer.get()
        process.join()
        print(
            f"{way:12} {found['peak']:9.0f} {found['seconds']:8.2f} {found['loss']:12.7f} {found['norm']:14.7f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
