#!/usr/bin/env python3
"""Measures a model's loss on held-out conversations and generates answers to fixed prompts."""

from __future__ import annotations

import argparse

from snaketune.common.cli import run
from snaketune.common.files import write_json
from snaketune.common.slurm import job_record
from snaketune.evaluation.arguments import (
    add_model_arguments,
    encoding_record,
    label_of,
    load_model,
    model_sha256,
)


def main() -> None:
    """Parses the command line, evaluates, and writes one JSON file."""
    parser = argparse.ArgumentParser(
        description="Measure loss and perplexity on held-out conversations, over the tokens that training learns to "
        "predict, and answer fixed prompts greedily. Each conversation is scored separately, so none leaks into another.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_arguments(parser, "evaluate_model")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a padded batch")
    args = parser.parse_args()

    # Check the input before importing torch and transformers, which takes seconds.
    from snaketune.chat_files.prompts import read_prompts
    from snaketune.encoding.chat_encoding import ChatEncoding
    from snaketune.encoding.tokenizer import load_tokenizer
    from snaketune.evaluation.generation import generate
    from snaketune.evaluation.heldout import heldout_digest, load_heldout

    prompts = read_prompts(args.prompts) if args.prompts else []
    encoding = ChatEncoding.from_options(vars(args))
    tokenizer = load_tokenizer(args.tokenizer_path).with_template(encoding.template)
    samples = load_heldout(args.heldout_dir, tokenizer, encoding, args.max_length, args.max_samples)
    print(
        f"{len(samples)} held-out conversations, {sum(len(sample.ids) for sample in samples)} tokens",
        flush=True,
    )

    from snaketune.evaluation.scoring import score

    model = load_model(args, tokenizer)
    result = score(model, samples, tokenizer.vocab_size, args.batch_tokens)
    label = label_of(args)
    write_json(
        args.output,
        {
            "format": 1,
            "label": label,
            "model": str(args.model),
            "model_sha256": model_sha256(args),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_length": args.max_length,
            **result,
            **encoding_record(tokenizer, encoding),
            "generations": generate(model, prompts, tokenizer, encoding, args.max_new_tokens)
            if prompts
            else [],
            "heldout_sha256": heldout_digest(args.heldout_dir),
            "tokenizer_sha256": tokenizer.sha256,
            **job_record(),
        },
    )
    print(
        f"{label}: loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f} "
        f"over {result['trained_tokens']} tokens of {result['samples']} conversations"
    )


if __name__ == "__main__":
    run(main)
