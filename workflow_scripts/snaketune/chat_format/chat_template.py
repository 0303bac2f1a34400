"""Chat templates: how the messages of a conversation become text, and which of it is trained on.

A conversation is a list of messages `{"role", "content", "name"?, "loss"?, "type"?}` (the ftdp format). A template
(see `snaketune.chat_format.template_file`) gives each role a prefix and a suffix, the text before and after the
content. Most roles make their own turn. Some join another role's turn: in `internlm2_chat` a `tool` (an action) and a
`thought` are appended, markup included, to the assistant turn before them, or start one. Others start the next turn of
another role: Mistral has no system turn, so the system text goes in front of the user's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

# With `loss: false` the role does not matter, and type "prefix" is not allowed.
_TRAINED_WITHOUT_LOSS = {"icl": False, "current": False, "meta": False}


class MessageError(ValueError):
    """A conversation is not in the ftdp format. `field` is a path such as `[2].role`."""

    def __init__(self, field: str, *, found: object, expected: str, fix: str):
        super().__init__(f"{field}: found {found}, expected {expected}")
        self.field, self.found, self.expected, self.fix = field, found, expected, fix


class Part(NamedTuple):
    """A stretch of a turn's content. `markup` is true for the template's text, false for a message's."""

    text: str
    markup: bool
    trained: bool


class Turn(NamedTuple):
    """One turn as text.

    Attributes:
        prefix: The template's text before the content.
        content: The content, including messages appended to it.
        suffix: The template's text after the content.
        content_trained: True if XTuner trains on the content. The message that made the turn decides.
        suffix_trained: True if XTuner trains on the suffix.
        name: (start, stop) of a message's free-form name in `prefix`.
        parts: The parts of the content if it has more than one message's content.
    """

    prefix: str
    content: str
    suffix: str
    content_trained: bool
    suffix_trained: bool
    name: tuple[int, int] | None = None
    parts: tuple[Part, ...] | None = None

    def user_texts(self) -> list[str]:
        """Returns the texts that come from the messages, not from the template."""
        texts = [part.text for part in self.parts if not part.markup] if self.parts else [self.content]
        return [*texts, self.prefix[slice(*self.name)]] if self.name else texts


@dataclass(frozen=True)
class Role:
    """How a template writes one role.

    Attributes:
        name: The role.
        prefix: Text before the content.
        suffix: Text after the content.
        named: Text before and after the name in the prefix of a named message; None leaves names out.
        map_names: True if names that the template lists become their control tokens.
        types: Message `type` -> True if the content is trained on. Any other type is an error.
        trained: True if the role writes answers; XTuner always trains on their suffix.
        part_of: The role whose turn this role continues or starts.
        opens: The role whose next turn starts with this role's text.
        by_name: Message name -> the role as it is written for that name.
    """

    name: str
    prefix: str = ""
    suffix: str = ""
    named: tuple[str, str] | None = None
    map_names: bool = True
    types: Mapping[str, bool] = field(default_factory=dict)
    trained: bool = False
    part_of: str | None = None
    opens: str | None = None
    by_name: Mapping[str, Role] = field(default_factory=dict)

    def respelled(self, spell: Any) -> Role:
        """Returns the role with `spell` applied to each of its texts."""
        return replace(
            self,
            prefix=spell(self.prefix),
            suffix=spell(self.suffix),
            named=self.named and (spell(self.named[0]), spell(self.named[1])),
            by_name={name: role.respelled(spell) for name, role in self.by_name.items()},
        )


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template; made by `snaketune.chat_format.template_file.load_template`.

    Attributes:
        name: The template's name.
        special_tokens: The control tokens in its texts. Missing ones are added to a tokenizer in this order.
        end_of_turn: The token that ends an answer.
        bos: True if a conversation starts with BOS.
        names: Message name -> the control token that replaces it.
        roles: Role name -> how the role is written.
        text: The text of the template file.
    """

    name: str = field(compare=False)
    special_tokens: tuple[str, ...]
    end_of_turn: str
    bos: bool
    names: Mapping[str, str]
    roles: Mapping[str, Role]
    text: str = field(compare=False)

    @property
    def sha256(self) -> str:
        """SHA-256 of the template file's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def generation_prompt(self) -> str:
        """The text that the model continues with its answer."""
        return self.roles["assistant"].prefix

    def respelled(self, spelling: Mapping[str, str]) -> ChatTemplate:
        """Returns the template with each token in `spelling` replaced by the text that it maps to."""
        if not spelling:
            return self
        longest_first = sorted(spelling, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)))

        def spell(text: str) -> str:
            return pattern.sub(lambda match: spelling[match[0]], text)

        return replace(
            self,
            names={name: spell(text) for name, text in self.names.items()},
            roles={name: role.respelled(spell) for name, role in self.roles.items()},
        )

    def turns(self, messages: Any, own_loss: bool = False) -> list[Turn]:
        """Returns the turns of a conversation. Does not modify the conversation.

        Args:
            messages: The conversation.
            own_loss: Respect the `loss` of a message that joins another message's turn; XTuner ignores it.

        Raises:
            MessageError: `messages` is not in the format. The error names the field and the fix.
        """
        if type(messages) is not list:
            raise _bad(
                "conversation", messages, "a list of messages", 'write [{"role": ..., "content": ...}, ...]'
            )
        result: list[Turn] = []
        roles = self.roles
        open_role = None
        waiting: tuple[Part, ...] = ()
        waiting_for = None
        for index, message in enumerate(messages):
            if type(message) is not dict:
                raise _bad(
                    f"[{index}]", message, "an object with role and content", "write the message as an object"
                )
            role_name = message.get("role")
            content = message.get("content")
            name = message.get("name")
            if type(content) is not str:
                raise _bad(
                    f"[{index}].content", content, "a string", 'add a string, "" if there is no text', message
                )
            if name is not None and type(name) is not str:
                raise _bad(f"[{index}].name", name, "a string", "put the name in quotes, or remove it")
            role = roles.get(role_name) if type(role_name) is str else None
            if role is None:
                raise _bad(
                    f"[{index}].role",
                    role_name,
                    "one of " + ", ".join(roles),
                    "use one of these roles",
                    message,
                )
            if name in role.by_name:
                role = role.by_name[name]
            prefix, name_at = role.prefix, None
            if name is not None and role.named is not None:
                before, after = role.named
                mapped = self.names.get(name) if role.map_names else None
                if mapped is None:
                    name_at = len(before), len(before) + len(name)
                prefix = before + (name if mapped is None else mapped) + after
            if role.part_of is not None:
                owner = roles[role.part_of]
                if waiting and waiting_for != role.part_of:
                    raise _misplaced(index, waiting_for, role_name)
                if open_role != role.part_of:
                    if not result:
                        raise _nothing_before(index, role_name, roles)
                    result.append(
                        Turn(owner.prefix, "", owner.suffix, owner.trained, owner.trained, None, ())
                    )
                    open_role = role.part_of
                result[-1] = _glue(result[-1], role, prefix, name_at, content, index, message, own_loss)
                continue
            trained = _content_trained(index, role, message)
            if role.opens is not None:
                waiting += _parts(prefix, name_at, content, role.suffix, False)
                waiting_for = role.opens
                continue
            parts = None
            if waiting:
                if role_name == waiting_for:
                    parts = (*waiting, Part(content, False, trained))
                    content = "".join(part.text for part in parts)
                    waiting = ()
                elif roles[role_name].opens != waiting_for:
                    raise _misplaced(index, waiting_for, role_name)
            open_role = role_name
            result.append(Turn(prefix, content, role.suffix, trained, role.trained, name_at, parts))
        if waiting:
            raise _misplaced(len(messages), waiting_for, "the end of the conversation")
        return result

    def render(self, messages: Any) -> str:
        """Returns a conversation as one text, without BOS."""
        return "".join(turn.prefix + turn.content + turn.suffix for turn in self.turns(messages))


def refuse_half_characters(conversation: list[Turn]) -> None:
    """Raises a MessageError for half a surrogate pair. No tokenizer can encode it (XTuner ends with a traceback)."""
    for index, turn in enumerate(conversation):
        try:
            (turn.prefix + turn.content).encode()
        except UnicodeEncodeError as error:
            raise MessageError(
                f"turn {index + 1}",
                found=f"half a surrogate pair, {error.object[error.start : error.end]!r}",
                expected="text that UTF-8 can encode",
                fix="replace the \\ud... escape with the whole character",
            ) from None


def _parts(
    prefix: str, name_at: tuple[int, int] | None, content: str, suffix: str, trained: bool
) -> tuple[Part, ...]:
    start, stop = name_at or (0, 0)
    pieces = (
        (prefix[:start], True),
        (prefix[start:stop], False),
        (prefix[stop:], True),
        (content, False),
        (suffix, True),
    )
    # Keep the content even if it is empty: the last part decides whether the suffix is trained on.
    return tuple(Part(text, markup, trained) for text, markup in pieces if text or not markup)


def _glue(
    turn: Turn,
    role: Role,
    prefix: str,
    name_at: tuple[int, int] | None,
    content: str,
    index: int,
    message: dict,
    own_loss: bool,
) -> Turn:
    trained = turn.content_trained
    if own_loss and "loss" in message:
        trained = _loss(index, message)
    before = (Part(turn.content, False, turn.content_trained),) if turn.parts is None else turn.parts
    return turn._replace(
        content=turn.content + prefix + content + role.suffix,
        parts=before + _parts(prefix, name_at, content, role.suffix, trained),
    )


def _loss(index: int, message: dict) -> bool:
    loss = message.get("loss", True)
    # XTuner takes the truth value in Python. null, 0 and 1 are fine; any string but "" would be true.
    if loss is not None and (not isinstance(loss, int) or loss not in (0, 1)):
        raise _bad(f"[{index}].loss", loss, "true or false", "write true or false without quotes")
    return bool(loss)


def _content_trained(index: int, role: Role, message: dict) -> bool:
    if "loss" not in message and "type" not in message and "current" in role.types:
        return role.types["current"]  # the common case
    loss = _loss(index, message)
    kind = message.get("type", "current")
    table = role.types if loss else _TRAINED_WITHOUT_LOSS
    if type(kind) is not str or kind not in table:
        allowed = " or ".join(sorted(set(table) - {"end"}))
        which = f"{allowed} for role {role.name}" + ("" if loss else " with loss: false")
        raise _bad(
            f"[{index}].type", kind, which, "use one of these types, or remove type (the default is current)"
        )
    return table[kind]


def _nothing_before(index: int, role: str, roles: Mapping[str, Role]) -> MessageError:
    making = [name for name, each in roles.items() if each.part_of is None]
    first = ", ".join(making[:-1]) + " or " + making[-1]
    return _bad(f"[{index}].role", role, f"a {first} message first", "put the user's message first")


def _misplaced(index: int, wanted: str | None, found: str) -> MessageError:
    return MessageError(
        f"[{index}].role",
        found=found,
        expected=f"a {wanted} message: the message before it becomes part of the next {wanted} turn",
        fix=f"insert a {wanted} message here",
    )


def _bad(field: str, value: object, expected: str, fix: str, message: dict | None = None) -> MessageError:
    name = field.rsplit(".", 1)[-1]
    if message is not None and name not in message:
        found = f"no {name!r} among the keys {sorted(map(str, message))}"
    else:
        found = f"{value!r:.80} ({type(value).__name__})"
    return MessageError(field, found=found, expected=expected, fix=fix)
