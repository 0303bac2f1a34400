"""Generates a Jinja `chat_template` for `apply_chat_template` from the template file that training uses."""

from __future__ import annotations

from snaketune.chat_format.chat_template import ChatTemplate, Role


def jinja_template(template: ChatTemplate) -> str:
    """Returns a Jinja template that renders the same text as `ChatTemplate.render`, after BOS if the template has one.

    The Jinja template does not validate its input. It is correct for messages that `ChatTemplate.turns` accepts, and
    renders any others to some text. If the template has plugins, OpenAI's `tools`, `tool_calls` and tool results are
    rendered as the equivalent messages of the training data.
    """
    opens = {each for role in template.roles.values() for each in _targets(role)}
    named = any(_uses_names(role) for role in template.roles.values())
    lines = ["{{ bos_token }}"] if template.bos else []
    # `ns` holds the open turn's role and suffix (`end`), and the text that waits for the next turn.
    source = "messages"
    if reads_openai_tools(template):
        lines += _OPENAI
        source = "given.all"
    lines += ["{% set ns = namespace(role='', end='', waiting='') %}", f"{{% for message in {source} %}}"]
    if named:
        lines.append("{% set name = message['name'] if message['name'] is defined else none %}")
    for place, role in enumerate(template.roles.values()):
        lines.append(f"{{% {'elif' if place else 'if'} message['role'] == {_quoted(role.name)} %}}")
        for number, (name, each) in enumerate(role.by_name.items()):
            lines.append(f"{{% {'elif' if number else 'if'} name == {_quoted(name)} %}}")
            lines += _message(template, each, opens)
        if role.by_name:
            lines.append("{% else %}")
        lines += _message(template, role, opens)
        if role.by_name:
            lines.append("{% endif %}")
    prompt = _quoted(template.generation_prompt)
    lines += [
        "{% endif %}",
        "{% endfor %}",
        "{{ ns.end }}",
        f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}",
    ]
    return "".join(lines)


def reads_openai_tools(template: ChatTemplate) -> bool:
    """True if the Jinja template reads tools in OpenAI's form, which needs a format with plugins."""
    roles = template.roles
    has_roles = {"system", "tool", "environment"} <= roles.keys()
    return has_roles and "plugin" in template.names and roles["tool"].named is not None


# Fills `given.all` with the messages, with plugins in the form of the training data.
_OPENAI = (
    "{% set given = namespace(all=[], told=not tools) %}",
    "{% set known = namespace(plugins=[]) %}",
    "{% for tool in tools or [] %}",
    "{% set known.plugins = known.plugins + [tool['function'] if tool['function'] is defined else tool] %}",
    "{% endfor %}",
    "{% for message in messages %}",
    "{% if not given.told and message['role'] != 'system' %}",
    "{% set given.told = true %}",
    "{% set given.all = given.all + [{'role': 'system', 'name': 'plugin', 'content': known.plugins | tojson}] %}",
    "{% endif %}",
    "{% if message['role'] == 'tool' and message['tool_call_id'] is defined %}",
    "{% set given.all = given.all + [{'role': 'environment', 'name': 'plugin', 'content': message['content']}] %}",
    "{% elif message['tool_calls'] %}",
    "{% if message['content'] %}",
    "{% set given.all = given.all + [{'role': 'assistant', 'content': message['content']}] %}",
    "{% endif %}",
    "{% for call in message['tool_calls'] %}",
    "{% set function = call['function'] if call['function'] is defined else call %}",
    "{% set arguments = function['arguments'] %}",
    "{% set arguments = arguments if arguments is string else arguments | tojson %}",
    "{% set body = '{\"name\": ' + function['name'] | tojson + ', \"parameters\": ' + arguments + '}' %}",
    "{% set given.all = given.all + [{'role': 'tool', 'name': 'plugin', 'content': body}] %}",
    "{% endfor %}",
    "{% else %}",
    "{% set given.all = given.all + [message] %}",
    "{% endif %}",
    "{% endfor %}",
)


def _message(template: ChatTemplate, role: Role, opens: set[str]) -> list[str]:
    prefix = _prefix(template, role)
    content, suffix = "message['content']", _quoted(role.suffix)
    if role.opens is not None:
        return [f"{{% set ns.waiting = ns.waiting + {prefix} + {content} + {suffix} %}}"]
    if role.part_of is None:
        waiting = ""
        done = []
        if role.name in opens:
            waiting, done = "ns.waiting + ", ["{% set ns.waiting = '' %}"]
        return [
            f"{{{{ ns.end + {prefix} + {waiting}{content} }}}}",
            *done,
            f"{{% set ns.role = {_quoted(role.name)} %}}{{% set ns.end = {suffix} %}}",
        ]
    owner = template.roles[role.part_of]
    return [
        f"{{% if ns.role != {_quoted(owner.name)} %}}",
        f"{{{{ ns.end + {_quoted(owner.prefix)} }}}}",
        f"{{% set ns.role = {_quoted(owner.name)} %}}{{% set ns.end = {_quoted(owner.suffix)} %}}",
        "{% endif %}",
        f"{{{{ {prefix} + {content} + {suffix} }}}}",
    ]


def _prefix(template: ChatTemplate, role: Role) -> str:
    """Returns a Jinja expression for the prefix."""
    if role.named is None:
        return _quoted(role.prefix)
    before, after = role.named
    name = "name"
    if role.map_names and template.names:
        pairs = ", ".join(f"{_quoted(key)}: {_quoted(value)}" for key, value in template.names.items())
        name = f"{{{pairs}}}.get(name, name)"
    return f"({_quoted(before)} + {name} + {_quoted(after)} if name is not none else {_quoted(role.prefix)})"


def _targets(role: Role) -> set[str]:
    return {each.opens for each in (role, *role.by_name.values()) if each.opens is not None}


def _uses_names(role: Role) -> bool:
    return bool(role.by_name) or role.named is not None


def _quoted(text: str) -> str:
    """Returns a Jinja string literal. Jinja reads the same escapes as Python."""
    return "'" + text.encode("unicode_escape").decode().replace("'", "\\'") + "'"
