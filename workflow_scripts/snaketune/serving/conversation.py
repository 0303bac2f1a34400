"""A conversation with a model that may call plugins: runs each call and returns its result to the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.evaluation.call_format import Call, CallReader

_MOST_CALLS = 8  # per user turn
Messages = list[dict[str, Any]]
Plugin = Callable[[Any], str]


class Conversation:
    """A conversation in the format of the training data.

    Args:
        tokenizer: The model's tokenizer.
        answer: Writes the assistant's next turn: the ids after the messages, without the end-of-turn token.
        plugins: Functions by plugin name.
        descriptions: Descriptions of the plugins for the model, as in the training data; if empty, none are sent.
        system: A system message, or None.
        show: Shows results of plugins; `answer` shows its own text.
    """

    def __init__(
        self,
        tokenizer: ExtendedTokenizer,
        answer: Callable[[Messages], Sequence[int]],
        plugins: Mapping[str, Plugin] | None = None,
        descriptions: Sequence[Mapping[str, Any]] = (),
        system: str | None = None,
        show: Callable[[str], None] = print,
    ):
        self._reader = CallReader(tokenizer)
        self._answer, self._plugins, self._show = answer, dict(plugins or {}), show
        self.messages: Messages = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        if descriptions:
            text = json.dumps(list(descriptions), ensure_ascii=False)
            self.messages.append({"role": "system", "name": "plugin", "content": text})

    def say(self, text: str) -> str:
        """Sends a user message and returns the last text of the assistant's turn, after all calls."""
        self.messages.append({"role": "user", "content": text})
        for _ in range(_MOST_CALLS):
            ids = self._answer(self.messages)
            before, calls = self._reader.read(ids)
            if not calls:
                self.messages.append({"role": "assistant", "content": self._reader.text(ids)})
                return self.messages[-1]["content"]
            if before:
                self.messages.append({"role": "assistant", "content": before})
            for call in calls:
                self._carry_out(call)
        return ""

    def _carry_out(self, call: Call) -> None:
        result = self._result(call)
        name = {"name": call.tool} if call.tool else {}
        self.messages.append({"role": "tool", **name, "content": call.body})
        self.messages.append({"role": "environment", **name, "content": result})
        self._show(f"[{call.tool or 'tool'}: {result}]")

    def _result(self, call: Call) -> str:
        if call.problem:
            return f"error: {call.problem}"
        if call.tool == "interpreter":
            return "error: code is not run here"
        try:
            request = json.loads(call.body)
        except ValueError:
            return "error: the call is not JSON"
        name = request.get("name") if isinstance(request, dict) else None
        plugin = self._plugins.get(name) if isinstance(name, str) else None
        if plugin is None:
            return f"error: unknown plugin {name!r}; available: {', '.join(self._plugins) or 'none'}"
        return plugin(request.get("parameters", request.get("arguments")))
