"""The ids of a prompt: a conversation, and the beginning of the assistant's turn."""

from __future__ import annotations

from snaketune.chat_format.chat_template import MAX_LENGTH, MessageError
from snaketune.common.cli import UserError
from snaketune.encoding.batch_encoder import encode_conversation
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.tokenizer import ExtendedTokenizer


def encode_prompt(
    prompt: list[dict],
    tokenizer: ExtendedTokenizer,
    encoding: ChatEncoding,
    where: str = "prompt",
    max_length: int | None = MAX_LENGTH,
) -> list[int]:
    """Returns the ids of a conversation and of the assistant's beginning turn, as training would see them.

    Raises:
        UserError: When a message is not in the format.
    """
    try:
        signed = encode_conversation(prompt, tokenizer, encoding, max_length)
    except MessageError as error:
        raise UserError(
            f"{where}: {error.field}", found=error.found, expected=error.expected, fix=error.fix
        ) from None
    prefix = tokenizer.tokenizer.encode(tokenizer.template.generation_prompt, add_special_tokens=False).ids
    return [abs(i) for i in signed] + prefix
