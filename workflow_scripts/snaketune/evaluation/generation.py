"""Greedy answers to fixed prompts, in the chat format used in training."""

from __future__ import annotations

from typing import Any

import torch

from snaketune.common.progress import Progress
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.prompt_ids import encode_prompt
from snaketune.encoding.tokenizer import ExtendedTokenizer


@torch.no_grad()  # not inference_mode: training reuses the weights that ZeRO-3 gathers here
def generate(
    model,
    prompts: list[list[dict]],
    tokenizer: ExtendedTokenizer,
    encoding: ChatEncoding,
    max_new_tokens: int,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Returns one greedy answer per prompt.

    An answer ends at the end of the turn, at the base's end token, or after `max_new_tokens`.

    BOS is suppressed: in packed sequences the end of a document learns to predict the BOS of the next one, so
    a weak model would generate it after every line break.

    Args:
        model: A transformers causal language model in eval mode.
        prompts: Conversations without the answer.
        tokenizer: The extended tokenizer.
        encoding: As in training.
        max_new_tokens: Maximum tokens of an answer.
        show_progress: Reports progress.

    Returns:
        [{"prompt": messages, "text": answer without the end token, "tokens": count, "finished": bool}]
    """
    from transformers import GenerationConfig

    ends = {tokenizer.end_of_turn_id, tokenizer.eos_token_id} - {None}
    pad_id = tokenizer.pad_token_id
    # Overrides the model's own settings, which may sample.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        suppress_tokens=[tokenizer.bos_token_id] if tokenizer.template.bos else None,
        pad_token_id=tokenizer.end_of_turn_id if pad_id is None else pad_id,
    )
    device = model.device
    progress = Progress("prompts", len(prompts), "tokens") if show_progress else None
    answers = []
    for number, prompt in enumerate(prompts, 1):
        prompt_ids = encode_prompt(prompt, tokenizer, encoding, f"prompt {number}")
        ids = torch.tensor([prompt_ids], device=device)
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        new = output[0, ids.shape[1] :].tolist()
        finished = bool(new) and new[-1] in ends
        # Keep special tokens: tool calls contain them.
        text = tokenizer.tokenizer.decode(new[:-1] if finished else new, skip_special_tokens=False)
        answers.append({"prompt": prompt, "text": text, "tokens": len(new), "finished": finished})
        if progress is not None:
            progress.add("generations", prompts=1, tokens=len(new))
    if progress is not None:
        print(f"generations: {progress.finish()}", flush=True)
    return answers
