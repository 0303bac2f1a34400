#!/usr/bin/env python3
"""Generates answers to held-out conversations and compares the model's tool calls with the reference."""

from __future__ import annotations

import argparse
from dataclasses import replace

from snaketune.common.cli import run
from snaketune.common.files import sha256_file, write_json
from snaketune.common.slurm import job_record
from snaketune.evaluation.arguments import (
    add_model_arguments,
    encoding_record,
    label_of,
    load_model,
    model_sha256,
)


def main() -> None:
    """Parses the command line, generates and scores the answers, and writes one JSON file."""
    parser = argparse.ArgumentParser(
        description="At each answer in held-out conversations, give the model the preceding tokens as in training and let "
        "it answer greedily. Check whether it calls a tool where the reference does, whether the call is well formed and "
        "equal to the reference, and whether the answer ends. Also measure the loss by role, and on plain text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_arguments(parser, "evaluate_tool_calls")
    args = parser.parse_args()

    # Check the input before importing torch and transformers, which takes seconds.
    from snaketune.encoding.batch_encoder import BatchEncoder
    from snaketune.encoding.chat_encoding import ChatEncoding
    from snaketune.encoding.tokenizer import load_tokenizer
    from snaketune.evaluation.conversations import read_conversations
    from snaketune.evaluation.heldout import heldout_digest
    from snaketune.evaluation.role_losses import plain_text_blocks
    from snaketune.evaluation.tool_calls import choose_points

    tokenizer = load_tokenizer(args.tokenizer_path)
    encoding = ChatEncoding.from_options(vars(args))
    encoder, exact = (BatchEncoder(tokenizer, each) for each in (encoding, replace(encoding, mask="exact")))
    conversations = read_conversations(args.heldout_dir, encoder, args.max_samples)
    points, selection = choose_points(conversations, encoder, args.max_points, args.max_length)
    blocks = plain_text_blocks(args.plain_text, tokenizer) if args.plain_text else []
    print(
        f"{len(conversations)} held-out conversations, {len(points)} points, "
        f"{selection['call']['points']} of which call a tool",
        flush=True,
    )

    from snaketune.evaluation.role_losses import conversation_losses, plain_text_losses
    from snaketune.evaluation.tool_calls import answer_points
    from snaketune.reporting.tool_call_tables import summarize

    model = load_model(args, tokenizer)
    label = label_of(args)
    answers = answer_points(model, points, tokenizer, args.max_new_tokens, args.batch_tokens)
    vocab_size = tokenizer.vocab_size
    result = {
        "format": 1,
        "label": label,
        "model": str(args.model),
        "model_sha256": model_sha256(args),
        "dtype": str(model.dtype).removeprefix("torch."),
        **encoding_record(tokenizer, encoding),
        "max_points": args.max_points,
        "max_new_tokens": args.max_new_tokens,
        "max_length": args.max_length,
        "max_samples": args.max_samples,
        "selection": selection,
        "points": answers,
        "losses": conversation_losses(model, conversations, encoder, exact, args.max_length, vocab_size),
        "plain_text": plain_text_losses(model, blocks, vocab_size),
        "plain_text_sha256": sha256_file(args.plain_text) if args.plain_text else None,
        "heldout_sha256": heldout_digest(args.heldout_dir),
        "tokenizer_sha256": tokenizer.sha256,
        **job_record(),
    }
    result["summary"] = summarize(result)
    write_json(args.output, result)
    whole = {row["metric"]: row["value"] for row in result["summary"] if row["scope"] == "all"}
    shown = (
        "recall",
        "precision",
        "well_formed",
        "exact",
        "argument_f1",
        "stopped",
        "loss.all",
        "loss.plain_text",
    )
    figures = [f"{name} {whole[name]:.3f}" for name in shown if whole.get(name) is not None]
    print(f"{label}: " + ", ".join(figures))


if __name__ == "__main__":
    run(main)
