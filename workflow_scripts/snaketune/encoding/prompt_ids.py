"""Encodes prompts: a conversation and the prefix of the assistant's turn."""

from __future__ import annotations

from snaketune.chat_format.chat_template import MessageError
from snaketune.common.cli import UserError
from snaketune.encoding.batch_encoder import encode_conversation
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.settings.schema import default_of


def encode_prompt(
    prompt: list[dict],
    tokenizer: ExtendedTokenizer,
    encoding: ChatEncoding,
    where: str = "prompt",
    max_length: int | None = default_of("data.max_tokens"),
) -> list[int]:
    """Returns the ids of a conversation and of the assistant's prefix, as in training.

    Raises:
        UserError: A message is not in the format.
    """
    try:
        signed = encode_conversation(prompt, tokenizer, encoding, max_length)
    except MessageError as error:
        raise UserError(
            f"{where}: invalid {error.field}", found=error.found, expected=error.expected, fix=error.fix
        ) from None
    prefix = tokenizer.tokenizer.encode(tokenizer.template.generation_prompt, add_special_tokens=False).ids
    return [abs(i) for i in signed] + prefix
