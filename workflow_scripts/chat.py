#!/usr/bin/env python3
"""Chats with a tuned model in the terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from snaketune.common.cli import run
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.settings.command_line import add_settings


def main() -> None:
    """Reads lines, streams the answers, and executes the model's tool calls."""
    parser = argparse.ArgumentParser(
        description="Chat with a tuned model, on a CPU or a GPU. Each line of standard input is a user turn; an empty line "
        "or the end of the input ends the chat. The model has one plugin, a calculator, and gets the results of its calls.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder, such as results/demo/hf")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--no-plugins", action="store_true", help="do not offer any plugin to the model")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="maximum length of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the most likely token")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on a GPU, float32 on a CPU",
    )
    add_settings(parser, "chat")
    args = parser.parse_args()

    from snaketune.encoding.tokenizer import load_tokenizer
    from snaketune.evaluation.models import load_for_evaluation
    from snaketune.serving import calculator
    from snaketune.serving.conversation import Conversation
    from snaketune.serving.streaming import StreamedAnswers

    tokenizer = load_tokenizer(args.model)
    model = load_for_evaluation(
        str(args.model),
        str(args.model),
        tokenizer,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    encoding = ChatEncoding.from_options(vars(args))
    answers = StreamedAnswers(model, tokenizer, encoding, args.max_new_tokens, args.temperature)
    has_tools = {"tool", "environment"} <= tokenizer.template.roles.keys() and not args.no_plugins
    plugins = {calculator.NAME: calculator.call} if has_tools else {}
    described = [calculator.DESCRIPTION] if has_tools else []
    conversation = Conversation(tokenizer, answers, plugins, described, args.system)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        conversation.say(line)


if __name__ == "__main__":
    run(main)
