"""The InternLM2 chat format as XTuner 0.2.0 applies it to ftdp data (its template name: `chatml_llamav13_32k`).

A conversation is a list of messages `{"role", "content", "name"?, "loss"?, "type"?}`. `tool` (an action) and `thought`
belong to the assistant: they are glued, markers included, to the assistant message before them or open one. Every
other message becomes one turn: a begin, the content, an end. Begin is never trained on. The assistant's end always is,
also with `loss: false`. The content is trained on as the table says for the role and `type`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MAX_LENGTH = 32 * 1024

# The order in which missing ones are added, and so the order of their ids.
SPECIAL_TOKENS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
END_OF_TURN = "<|im_end|>"

_NAMES = {"interpreter": "<|interpreter|>", "plugin": "<|plugin|>"}
_END = "<|im_end|>\n"
# Roles that make a turn, and those whose name may be a special token.
_TURN_ROLES = ("system", "user", "assistant", "environment")
_GLUED_ROLES = ("tool", "thought")
ROLES = _TURN_ROLES + _GLUED_ROLES

# Is the content trained on, by role and type? A pair that is not here is an error ("end" is what XTuner's table
# happens to accept for the assistant).
_TRAINED = {
    "system": {"meta": False, "icl": False, "current": False, "prefix": False},
    "user": {"icl": False, "current": False, "prefix": False},
    "assistant": {"icl": True, "current": True, "prefix": False, "end": True},
    "environment": {"icl": False, "current": False, "prefix": False},
}
# With `loss: false` the role does not count, and there is no entry for "prefix".
_TRAINED_WITHOUT_LOSS = {"icl": False, "current": False, "meta": False}


class MessageError(ValueError):
    """A conversation that is not in the format. `field` is a path such as `[2].role`."""

    def __init__(self, field: str, *, found: object, expected: str, fix: str):
        super().__init__(f"{field}: found {found}, expected {expected}")
        self.field, self.found, self.expected, self.fix = field, found, expected, fix


class Turn(NamedTuple):
    """One turn as text. `begin` and `end` are never empty."""

    begin: str
    content: str
    end: str
    content_trained: bool
    end_trained: bool


def turns(messages: Any) -> list[Turn]:
    """Returns the turns of a conversation; the conversation is left as it is.

    Raises:
        MessageError: The value is not a conversation in the format; says which field and what to change.
    """
    if type(messages) is not list:
        raise _bad(
            "conversation", messages, "a list of messages", 'write [{"role": ..., "content": ...}, ...]'
        )
    result: list[Turn] = []
    assistant_open = False
    for index, message in enumerate(messages):
        if type(message) is not dict:
            raise _bad(
                f"[{index}]", message, "an object with role and content", "write the message as an object"
            )
        role = message.get("role")
        content = message.get("content")
        name = message.get("name")
        if type(content) is not str:
            raise _bad(
                f"[{index}].content", content, "a string", 'give it a text, "" if there is none', message
            )
        if name is not None and type(name) is not str:
            raise _bad(f"[{index}].name", name, "a string", "put the name in quotes, or leave it out")
        if role in _GLUED_ROLES:
            text = _glued_text(role, name, content)
            if assistant_open:
                result[-1] = result[-1]._replace(content=result[-1].content + text)
                continue
            if not result:
                raise _bad(
                    f"[{index}].role",
                    role,
                    "a system, user, assistant or environment message first",
                    "put the user's message before it",
                )
            result.append(Turn("<|im_start|>assistant\n", text, _END, True, True))
            assistant_open = True
            continue
        if type(role) is not str or role not in _TURN_ROLES:
            raise _bad(
                f"[{index}].role", role, "one of " + ", ".join(ROLES), "use one of these roles", message
            )
        assistant_open = role == "assistant"
        trained = _content_trained(index, role, message)
        result.append(Turn(_begin(role, name), content, _END, trained, assistant_open))
    return result


def refuse_half_characters(conversation: list[Turn]) -> None:
    """Raises a MessageError for half a surrogate pair: no tokenizer can encode it (XTuner ends with a traceback)."""
    for index, turn in enumerate(conversation):
        try:
            (turn.begin + turn.content).encode()
        except UnicodeEncodeError as error:
            raise MessageError(
                f"turn {index + 1}",
                found=f"half a surrogate pair, {error.object[error.start : error.end]!r}",
                expected="text that UTF-8 can hold",
                fix="replace the \\ud... escape by the whole character",
            ) from None


def render(messages: Any) -> str:
    """Returns a conversation as one text, without BOS."""
    return "".join(turn.begin + turn.content + turn.end for turn in turns(messages))


def _begin(role: str, name: str | None) -> str:
    if name is None:
        return f"<|im_start|>{role}\n"
    shown = name if role == "user" else _NAMES.get(name, name)
    return f"<|im_start|>{role} name={shown}\n"


def _glued_text(role: str, name: str | None, content: str) -> str:
    if role == "thought":
        return content
    begin = "" if name is None else f"<|action_start|>{_NAMES.get(name, name)}\n"
    return f"{begin}{content}<|action_end|>\n"


def _content_trained(index: int, role: str, message: dict) -> bool:
    loss = message.get("loss", True)
    kind = message.get("type", "current")
    # null, 0 and 1 mean what Python makes of them in XTuner; a string would always count as true.
    if loss is not None and (not isinstance(loss, int) or loss not in (0, 1)):
        raise _bad(f"[{index}].loss", loss, "true or false", "write true or false without quotes")
    table = _TRAINED[role] if loss else _TRAINED_WITHOUT_LOSS
    if type(kind) is not str or kind not in table:
        allowed = " or ".join(sorted(set(table) - {"end"}))
        which = f"{allowed} for role {role}" + ("" if loss else " with loss: false")
        raise _bad(
            f"[{index}].type", kind, which, "use one of these types, or leave type out (it means current)"
        )
    return table[kind]


def _bad(field: str, value: object, expected: str, fix: str, message: dict | None = None) -> MessageError:
    name = field.rsplit(".", 1)[-1]
    if message is not None and name not in message:
        found = f"no {name!r} among the keys {sorted(map(str, message))}"
    else:
        found = f"{value!r:.80} ({type(value).__name__})"
    return MessageError(field, found=found, expected=expected, fix=fix)


# The same format for `apply_chat_template` of a saved tokenizer; a test holds it equal to `render`.
_JINJA_NAME = (
    "{'interpreter': '<|interpreter|>', 'plugin': '<|plugin|>'}.get(message['name'], message['name'])"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set named = message['name'] is defined and message['name'] is not none %}"
    "{% if message['role'] in ['tool', 'thought'] %}"
    "{% if loop.first or loop.previtem['role'] not in ['assistant', 'tool', 'thought'] %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% endif %}"
    "{% if message['role'] == 'tool' and named %}"
    "{{ '<|action_start|>' + " + _JINJA_NAME + " + '\\n' }}"
    "{% endif %}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'tool' %}{{ '<|action_end|>\\n' }}{% endif %}"
    "{% else %}"
    "{{ '<|im_start|>' + message['role'] }}"
    "{% if named and message['role'] == 'user' %}{{ ' name=' + message['name'] }}"
    "{% elif named %}{{ ' name=' + " + _JINJA_NAME + " }}"
    "{% endif %}"
    "{{ '\\n' + message['content'] }}"
    "{% endif %}"
    "{% if message['role'] not in ['assistant', 'tool', 'thought'] or loop.last"
    " or loop.nextitem['role'] not in ['tool', 'thought'] %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
