"""Reads the tool calls of an answer, as the chat template writes them.

Control tokens count only as tokens: text that spells `<|action_start|>` out is text. So the ids are read, not the
decoded answer, and the template says what stands before and after a call. In `internlm2_chat` that is
`<|action_start|><|plugin|>` and `<|action_end|>`, in other templates it may be ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from snaketune.chat_format.chat_template import ChatTemplate
from snaketune.encoding.control_tokens import control_tokens
from snaketune.encoding.tokenizer import ExtendedTokenizer

# Noncharacters of Unicode: no text that a tokenizer was made for holds them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")


@dataclass(frozen=True)
class Call:
    """A tool call.

    Attributes:
        tool: The name that the control tokens give it, such as `plugin` or `interpreter`; None where the template
            writes no name.
        body: What is called, JSON or code.
        problem: What is wrong with the tokens around it, None if nothing is.
    """

    tool: str | None
    body: str
    problem: str | None = None


class CallReader:
    """Reads answers written in one chat template.

    Args:
        tokenizer: The extended tokenizer.
        template: By default the one saved with it.
    """

    def __init__(self, tokenizer: ExtendedTokenizer, template: ChatTemplate | None = None):
        template = template or tokenizer.template
        self._decode = tokenizer.tokenizer.decode
        names = control_tokens(tokenizer.tokenizer, (*template.special_tokens, template.end_of_turn))
        self._control = {tokenizer.tokenizer.token_to_id(name): name for name in names}
        marked = template.respelled({name: f"{_OPEN}{name}{_CLOSE}" for name in names})
        tool = marked.roles.get("tool")
        self._names: dict[str, str] = {}
        self._name_end = ""
        self._head = self._end = ""
        if tool is not None:
            begin = tool.begin
            if tool.named is not None:
                begin, self._name_end = tool.named
                self._names = {token: name for name, token in marked.names.items()} if tool.map_names else {}
            self._named = tool.named is not None
            self._head, self._end = begin.strip(), tool.end.strip()

    def text(self, ids: Sequence[int]) -> str:
        """Returns ids as text, control tokens included."""
        return _MARKED.sub(r"\1", self._marked(ids))

    def read(self, ids: Sequence[int]) -> tuple[str, list[Call]]:
        """Returns the text before the first call, and the calls.

        Args:
            ids: An answer, without the id that ends the turn.
        """
        answer = self._marked(ids)
        if not self._head:
            return _MARKED.sub(r"\1", answer), []
        before, *rest = answer.split(self._head)
        calls = [self._call(each) for each in rest]
        if calls and _MARKED.search(before):
            stray = _MARKED.search(before)[1]
            calls[0] = Call(calls[0].tool, calls[0].body, f"{stray} before the call")
        return _MARKED.sub(r"\1", before), calls

    def _marked(self, ids: Sequence[int]) -> str:
        pieces, run = [], []
        for token in ids:
            if token in self._control:
                pieces += [self._decode(run, skip_special_tokens=False)] if run else []
                pieces.append(f"{_OPEN}{self._control[token]}{_CLOSE}")
                run = []
            else:
                run.append(token)
        return "".join(pieces + ([self._decode(run, skip_special_tokens=False)] if run else []))

    def _call(self, text: str) -> Call:
        tool, problem = None, None
        if self._named:
            tool, text = self._split_name(text)
            if tool is None:
                problem = "no tool's name after the begin of the call"
        body, after = text, ""
        if self._end:
            body, end, after = text.partition(self._end)
            if not end:
                problem = problem or "no end of the call"
            if after.strip():
                found = _MARKED.sub(r"\1", after.strip())[:40]
                problem = problem or f"{found!r} after the end of the call"
        stray = _MARKED.search(body)
        if stray:
            problem = problem or f"{stray[1]} inside the call"
        return Call(tool, _MARKED.sub(r"\1", body).strip(), problem)

    def _split_name(self, text: str) -> tuple[str | None, str]:
        for token, name in self._names.items():
            if text.startswith(token):
                return name, text[len(token) :]
        name, end, rest = text.partition(self._name_end)
        if not self._name_end or not end or not name.strip() or _OPEN in name:
            return None, text
        return name, rest
