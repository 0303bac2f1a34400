"""Loss by role of the assistant's tokens, and loss on plain text, which measures forgetting.

Roles of the trained tokens: `assistant` (text), `thought`, `call` (a tool call with its control tokens) and
`code` (an interpreter call). The end of a turn has the role of the message that it ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from snaketune.common.cli import UserError
from snaketune.encoding.batch_encoder import BatchEncoder
from snaketune.encoding.control_tokens import literal_tokenizer
from snaketune.encoding.signed_ids import signed_ids
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.evaluation.call_verdicts import INTERPRETER
from snaketune.evaluation.conversations import Conversation
from snaketune.evaluation.heldout import Sample

# Tokens of unknown role, merged by the tokenizer across the edge of a message.
UNCLEAR = "unclear"
ALL = "all"


def role_of(message: dict[str, Any]) -> str | None:
    """Returns the role of a message's tokens; None if it is not an assistant message."""
    role = message["role"]
    if role == "tool":
        return "code" if message.get("name") == INTERPRETER else "call"
    return role if role in ("assistant", "thought") else None


def token_roles(conversation: Conversation, ids: Sequence[int], exact: BatchEncoder) -> list[str]:
    """Returns the role of each id of a conversation; ids outside assistant messages are `unclear`.

    The exact mask locates messages in the text. So the conversation is encoded once per role, with a loss on
    that role's messages only; the ids that come out as trained belong to the role.

    Args:
        conversation: The conversation.
        ids: Its unsigned ids.
        exact: The encoder that produced the ids, but with `mask="exact"`.
    """
    result = [UNCLEAR] * len(ids)
    for role in {role_of(message) for message in conversation.messages} - {None}:
        marked = [
            {key: value for key, value in message.items() if key != "type"}
            | {"loss": role_of(message) == role}
            for message in conversation.messages
        ]
        signed = signed_ids(exact.encode_turns([exact.turns(marked)])[0])
        if [abs(token) for token in signed] != list(ids):
            return [UNCLEAR] * len(ids)  # `compat` dropped or shifted an id
        result = [role if token > 0 else old for token, old in zip(signed, result, strict=True)]
    return result


def conversation_losses(
    model,
    conversations: Sequence[Conversation],
    encoder: BatchEncoder,
    exact: BatchEncoder,
    max_length: int,
    vocab_size: int,
    batch_tokens: int = 2048,
) -> list[dict[str, Any]]:
    """Returns the loss of each conversation by role.

    Args:
        model: A causal language model in eval mode.
        conversations: Held-out conversations, each evaluated by itself.
        encoder: The encoder used in training.
        exact: See `token_roles`.
        max_length: Maximum ids of a conversation; longer ones are cut.
        vocab_size: Ids of the tokenizer.
        batch_tokens: Maximum ids of a padded batch.

    Returns:
        [{"conversation", "dataset", "language", "roles": {role: [sum of nats, tokens]}}]; role "all" is their
        sum.
    """
    samples, roles = [], {}
    for place, conversation in enumerate(conversations):
        signed = signed_ids(encoder.encode_turns([conversation.turns])[0])
        every = token_roles(conversation, [abs(token) for token in signed], exact)
        signed = signed[:max_length]
        sample = Sample(str(place), [abs(token) for token in signed], [token > 0 for token in signed], False)
        # Nothing precedes the first id, so nothing predicts it.
        roles[place] = [role for role, token in zip(every[1:], signed[1:], strict=False) if token > 0]
        samples.append(sample)
    result: list[dict[str, Any]] = [
        {
            "conversation": conversation.place,
            "dataset": conversation.dataset,
            "language": conversation.language,
            "roles": {},
        }
        for conversation in conversations
    ]
    for sample, losses in _losses(model, samples, vocab_size, batch_tokens, "loss by role"):
        place = int(sample.dataset)
        sums = result[place]["roles"]
        for role, loss in zip(roles[place], losses, strict=True):
            for name in (role, ALL):
                total, tokens = sums.get(name, (0.0, 0))
                sums[name] = [total + loss, tokens + 1]
    return result


def plain_text_blocks(path: Path, tokenizer: ExtendedTokenizer, block_tokens: int = 1024) -> list[list[int]]:
    """Returns the ids of a text without chat format, cut into blocks that are evaluated separately.

    Each block starts with BOS if the chat template has one. Control tokens in the text are ordinary text.

    Args:
        path: A UTF-8 text file.
        tokenizer: The extended tokenizer.
        block_tokens: Ids per block, including BOS.

    Raises:
        UserError: The file cannot be read, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the plain text {path}", found=error, expected="a UTF-8 text file"
        ) from None
    literal = literal_tokenizer(tokenizer, tokenizer.template.special_tokens).tokenizer
    ids = literal.encode(text, add_special_tokens=False).ids
    begin = [tokenizer.bos_token_id] if tokenizer.template.bos else []
    step = block_tokens - len(begin)
    blocks = [begin + ids[start : start + step] for start in range(0, len(ids), step)]
    blocks = [block for block in blocks if len(block) > 1]
    if not blocks:
        raise UserError(
            f"the plain text {path} is empty", found=f"{len(ids)} tokens", expected="a few pages of text"
        )
    return blocks


def plain_text_losses(
    model, blocks: Sequence[list[int]], vocab_size: int, batch_tokens: int = 2048
) -> list[list[float]]:
    """Returns [sum of nats, tokens] for each block; the first id of a block is not a target.

    Args:
        model: A causal language model in eval mode.
        blocks: From `plain_text_blocks`.
        vocab_size: Ids of the tokenizer.
        batch_tokens: Maximum ids of a padded batch.
    """
    samples = [Sample(str(number), ids, [True] * len(ids), False) for number, ids in enumerate(blocks)]
    result: list[list[float]] = [[0.0, 0] for _ in samples]
    for sample, losses in _losses(model, samples, vocab_size, batch_tokens, "plain text"):
        result[int(sample.dataset)] = [math.fsum(losses), len(losses)]
    return result


def _losses(
    model, samples: list[Sample], vocab_size: int, batch_tokens: int, what: str
) -> Iterable[tuple[Sample, list[float]]]:
    from snaketune.common.progress import Progress
    from snaketune.evaluation.heldout import batches_by_length
    from snaketune.evaluation.scoring import token_losses

    progress = Progress("tokens", sum(len(sample.ids) for sample in samples))
    for batch in batches_by_length(samples, batch_tokens):
        for sample, losses in zip(batch, token_losses(model, batch, vocab_size), strict=True):
            yield sample, losses.tolist()
        progress.add(what, tokens=sum(len(sample.ids) for sample in batch))
