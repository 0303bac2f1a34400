#!/usr/bin/env python3
"""Measures a model's loss on held-out conversations and lets it answer fixed prompts."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from common.cli import run
from common.files import write_json
from ftdp.encode import CONTROL_TOKENS, MASKS


def main() -> None:
    """Parses the command line, evaluates, and writes one JSON file."""
    parser = argparse.ArgumentParser(
        description="Measure loss and perplexity on held-out conversations, over the tokens that training learns to "
        "predict, and answer fixed prompts greedily. Conversations are seen one by one, so none leaks into another.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--tokenizer-path", required=True, help="folder of the extended tokenizer")
    parser.add_argument(
        "--heldout-dir",
        type=Path,
        required=True,
        help="conversations as <dataset>/processed/<any>/<file>.jsonl",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--prompts", type=Path, help="JSON list of conversations to answer; without it none")
    parser.add_argument(
        "--max-length", type=int, default=2048, help="tokens after which a conversation is cut"
    )
    parser.add_argument("--max-samples", type=int, help="conversations per dataset; without it all")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a padded batch")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--attention", default="auto", help="auto, sdpa, flash_attention_2 or another name")
    parser.add_argument(
        "--base-model",
        action="store_true",
        help="grow the embedding to the tokenizer as training does at its start",
    )
    parser.add_argument(
        "--template",
        help="chat template that the model is trained with: a shipped name, or a path to a template file; without it "
        "the one saved with the tokenizer",
    )
    parser.add_argument(
        "--mask", choices=MASKS, default="compat", help="which tokens are trained on, and so predicted here"
    )
    parser.add_argument(
        "--control-tokens",
        choices=CONTROL_TOKENS,
        default="literal",
        help="what training makes of control tokens typed inside a message",
    )
    parser.add_argument("--label", default=None, help="what the report calls it; default base or tuned")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    args = parser.parse_args()

    # Bad input shows before the seconds that torch and transformers take.
    from evaluation.generation import generate, read_prompts
    from evaluation.heldout import heldout_digest, load_heldout
    from ftdp.template_file import load_template
    from ftdp.tokenizer import load_tokenizer

    prompts = read_prompts(args.prompts) if args.prompts else []
    tokenizer = load_tokenizer(args.tokenizer_path)
    if args.template:
        tokenizer = dataclasses.replace(tokenizer, template=load_template(args.template))
    options = {"mask": args.mask, "control_tokens": args.control_tokens}
    samples = load_heldout(args.heldout_dir, tokenizer, args.max_length, args.max_samples, **options)
    print(
        f"{len(samples)} held-out conversations, {sum(len(sample.ids) for sample in samples)} tokens",
        flush=True,
    )

    from evaluation.models import load_for_evaluation
    from evaluation.scoring import score

    model = load_for_evaluation(
        args.model,
        args.tokenizer_path,
        tokenizer,
        base=args.base_model,
        dtype=args.dtype,
        attention=args.attention,
        trust_remote_code=args.trust_remote_code,
    )
    result = score(model, samples, tokenizer.end_of_turn_id, args.batch_tokens)
    label = args.label or ("base" if args.base_model else "tuned")
    write_json(
        args.output,
        {
            "format": 1,
            "label": label,
            "model": str(args.model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_length": args.max_length,
            **result,
            "template": tokenizer.template.name,
            **options,
            "generations": generate(model, prompts, tokenizer, args.max_new_tokens, **options)
            if prompts
            else [],
            "heldout_sha256": heldout_digest(args.heldout_dir),
            "tokenizer_sha256": tokenizer.sha256,
        },
    )
    print(
        f"{label}: loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f} "
        f"over {result['trained_tokens']} tokens of {result['samples']} conversations"
    )


if __name__ == "__main__":
    run(main)
