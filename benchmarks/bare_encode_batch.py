"""Encodes conversations with `encode_batch` of the tokenizers library and does nothing else.

The baseline of tokenize_vs_xtuner.py. Each message with its markers is one text. Uses batches of 1,000
conversations and the library's own threads. Prints the seconds of encoding alone, its CPU seconds and the
number of tokens.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

import orjson
from tokenizers import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processed-dir", type=Path, required=True, help="ftdp layout")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json with the chat tokens")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(args.tokenizer)
    seconds, cpu, tokens = 0.0, 0.0, 0
    for file in sorted(args.processed_dir.rglob("*.jsonl")):
        with open(file, "rb") as lines:
            while batch := list(islice(lines, 1000)):
                texts = [
                    f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
                    for line in batch
                    for message in orjson.loads(line)
                ]
                start, used = time.perf_counter(), time.process_time()
                encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
                seconds, cpu = seconds + time.perf_counter() - start, cpu + time.process_time() - used
                tokens += sum(len(encoding) for encoding in encodings)
    print(f"{seconds:.3f} {cpu:.3f} {tokens}")


if __name__ == "__main__":
    main()
