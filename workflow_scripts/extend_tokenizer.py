"""Adds a chat template's control tokens to a base tokenizer and saves both for all later stages.

tokenizer.json is the source of truth. Tokens in the base keep their ids; missing ones get the next ids in the
template's order (InternLM2's: <|plugin|> <|interpreter|> <|action_end|> <|action_start|> <|im_end|>
<|im_start|>). Nothing else in the file changes. A base with only a SentencePiece BPE tokenizer.model gets the
tokenizer.json that transformers 4.48 makes from it. The saved tokenizer gives the same ids in tokenizers and
in transformers 4 and 5, and its apply_chat_template renders the same text as in training.
"""

from __future__ import annotations

import argparse

from snaketune.common.cli import run
from snaketune.encoding.base_tokenizer import open_tokenizer
from snaketune.settings.command_line import add_settings


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--tokenizer-path",
        required=True,
        help="folder with tokenizer.json or tokenizer.model, one of these files, or a hub name",
    )
    parser.add_argument(
        "--tokenizer-w-special-tokens-save-dir",
        required=True,
        help="receives tokenizer.json and its settings, chat_template.yaml and manifest.json",
    )
    add_settings(parser, "extend_tokenizer")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    save_dir = args.tokenizer_w_special_tokens_save_dir
    extended = open_tokenizer(args.tokenizer_path, save_dir, args.trust_remote_code, args.template)
    added = ", ".join(f"{token} {token_id}" for token, token_id in extended.added.items())
    print(f"{save_dir}: {extended.vocab_size} ids; added: {added or 'none, the base has all of them'}")


if __name__ == "__main__":
    run(main)
