"""Prints a model's answers to the terminal as they are generated."""

from __future__ import annotations

import sys
from typing import Any, TextIO

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.prompt_ids import encode_prompt
from snaketune.encoding.tokenizer import ExtendedTokenizer

_UNFINISHED = "\ufffd"  # the decoder's output for an incomplete character


class TokenPrinter(BaseStreamer):
    """Prints tokens as they arrive, and holds back incomplete characters."""

    def __init__(self, tokenizer: ExtendedTokenizer, stream: TextIO):
        self._tokenizer, self._stream = tokenizer, stream
        self._ids: list[int] | None = None
        self._shown = ""

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt first, then each token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += [i for i in value.flatten().tolist() if i != self._tokenizer.end_of_turn_id]
        text = self._tokenizer.tokenizer.decode(self._ids, skip_special_tokens=False)
        if not text.endswith(_UNFINISHED):
            self._write(text)

    def end(self) -> None:
        """Prints what was held back, and ends the line."""
        self._write(self._tokenizer.tokenizer.decode(self._ids or [], skip_special_tokens=False))
        self._stream.write("\n")
        self._stream.flush()

    def _write(self, text: str) -> None:
        self._stream.write(text[len(self._shown) :])
        self._stream.flush()
        self._shown = text


class StreamedAnswers:
    """Generates answers and prints them as they are generated.

    Args:
        model: A transformers causal language model in eval mode.
        tokenizer: Its tokenizer.
        encoding: As in training.
        max_new_tokens: Longest answer in tokens.
        temperature: 0 always picks the likeliest token.
        stream: Where to print.
    """

    def __init__(
        self,
        model,
        tokenizer: ExtendedTokenizer,
        encoding: ChatEncoding,
        max_new_tokens: int,
        temperature: float = 0.0,
        stream: TextIO = sys.stdout,
    ):
        self._model, self._tokenizer, self._encoding, self._stream = model, tokenizer, encoding, stream
        self._ends = {tokenizer.end_of_turn_id, tokenizer.eos_token_id} - {None}
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self._ends),
            # As in the evaluation: packing teaches the model to predict the next document's BOS after a document.
            suppress_tokens=[tokenizer.bos_token_id] if tokenizer.template.bos else None,
            pad_token_id=tokenizer.end_of_turn_id,
            **sampling,
        )

    @torch.inference_mode()
    def __call__(self, messages: list[dict[str, Any]]) -> list[int]:
        """Returns the ids of the assistant's next turn, without the end-of-turn token."""
        ids = torch.tensor([encode_prompt(messages, self._tokenizer, self._encoding, max_length=None)])
        ids = ids.to(self._model.device)
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=True,
            streamer=TokenPrinter(self._tokenizer, self._stream),
        )
        new = output[0, ids.shape[1] :].tolist()
        return new[:-1] if new and new[-1] in self._ends else new
