"""Parses the tool calls of an answer in the format of the chat template.

Control tokens count only as tokens: text that spells out `<|action_start|>` is text. So the parser reads the
ids, not the decoded answer. The template defines the prefix and suffix of a call:
`<|action_start|><|plugin|>` and `<|action_end|>` in `internlm2_chat`, possibly ordinary text in other
templates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from snaketune.chat_format.chat_template import ChatTemplate
from snaketune.encoding.control_tokens import control_tokens
from snaketune.encoding.tokenizer import ExtendedTokenizer

# Unicode noncharacters, which do not occur in real text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")


@dataclass(frozen=True)
class Call:
    """A tool call.

    Attributes:
        tool: The name given by its control tokens, such as `plugin` or `interpreter`; None if the template
            writes no name.
        body: The call itself, JSON or code.
        problem: The error in the tokens around it; None if there is none.
    """

    tool: str | None
    body: str
    problem: str | None = None


class CallReader:
    """Parses answers written in a chat template.

    Args:
        tokenizer: The extended tokenizer.
        template: Default: the one saved with the tokenizer.
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
        self._prefix = self._suffix = ""
        if tool is not None:
            prefix = tool.prefix
            if tool.named is not None:
                prefix, self._name_end = tool.named
                self._names = {token: name for name, token in marked.names.items()} if tool.map_names else {}
            self._named = tool.named is not None
            self._prefix, self._suffix = prefix.strip(), tool.suffix.strip()

    def text(self, ids: Sequence[int]) -> str:
        """Decodes ids, including control tokens."""
        return _MARKED.sub(r"\1", self._marked(ids))

    def read(self, ids: Sequence[int]) -> tuple[str, list[Call]]:
        """Splits an answer into the text before the first call and the calls.

        Args:
            ids: An answer without its end-of-turn id.
        """
        answer = self._marked(ids)
        if not self._prefix:
            return _MARKED.sub(r"\1", answer), []
        before, *rest = answer.split(self._prefix)
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
                problem = "no tool name at the start of the call"
        body, after = text, ""
        if self._suffix:
            body, suffix, after = text.partition(self._suffix)
            if not suffix:
                problem = problem or "the call is not closed"
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
