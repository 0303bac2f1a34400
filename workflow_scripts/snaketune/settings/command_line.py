"""Settings on command lines: the flags that a script takes, and those that a rule passes to it.

Both come from the schema, whose `x-scripts` names the scripts that take a setting and their flags.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from snaketune.settings.schema import load_schema


@dataclass(frozen=True)
class Flag:
    """A script's flag for a setting.

    Attributes:
        key: The setting, such as `train.lora.rank`.
        name: The flag, such as `--lora-rank`.
        rule: The setting's part of the schema.
        default: The script's default without the flag.
        also: Values beyond the schema's limits that the script accepts.
    """

    key: str
    name: str
    rule: Mapping[str, Any]
    default: Any
    also: tuple = ()

    @property
    def dest(self) -> str:
        """The flag's name in argparse's namespace."""
        return self.name.removeprefix("--").replace("-", "_")

    def is_of(self, names: tuple[str, ...]) -> bool:
        """True if `names` has the setting or its section."""
        return any(f"{self.key}.".startswith(f"{name}.") for name in names)


@cache
def script_flags(script: str) -> tuple[Flag, ...]:
    """Returns a script's flags for settings, in the order of the schema.

    Args:
        script: Name of the script without `.py`.
    """
    sections = load_schema()["properties"].items()
    return tuple(flag for name, rule in sections for flag in _flags_below(script, name, rule, None, ""))


def _flags_below(script: str, key: str, rule: Mapping[str, Any], above: Any, prefix: str):
    entry = rule.get("x-scripts", {}).get(script, above)
    if "properties" in rule:
        for name, each in rule["properties"].items():
            # A flag leaves out the section, but not a setting with keys of its own: --lora-rank.
            inner = f"{key.partition('.')[2]}-" if "." in key else ""
            yield from _flags_below(script, f"{key}.{name}", each, entry, inner)
    elif entry is not None:
        form = entry if isinstance(entry, dict) else {"flag": entry}
        name = form["flag"].replace("*", prefix + key.rpartition(".")[2]).replace("_", "-")
        default = form.get("default", rule.get("default"))
        yield Flag(key, name, rule, default, tuple(form.get("also", ())))


def add_settings(parser: argparse._ActionsContainer, script: str, *names: str) -> None:
    """Adds a script's flags for settings, with type, default, choices, limits and help from the schema.

    Args:
        parser: The script's parser, or one of its groups.
        script: Name of the script without `.py`.
        names: Sections, or keys such as `train.lr`, to add; all by default.
    """
    for flag in script_flags(script):
        if not names or flag.is_of(names):
            parser.add_argument(flag.name, default=flag.default, help=_help(flag), **_reading(flag))


def defaults_of(script: str) -> dict[str, Any]:
    """Returns a script's defaults for its settings, by their names in argparse's namespace."""
    return {flag.dest: flag.default for flag in script_flags(script)}


def options_of(script: str, settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Returns the settings that a rule passes to a script, as arguments of `flags`.

    Args:
        script: Name of the script without `.py`.
        settings: A run's settings by section. Missing settings give no flag.
        names: Sections, or keys such as `train.lr`. The result follows their order; within a section, the
            schema's.

    Raises:
        ValueError: The script takes no flag of one of the names.
    """
    options = {}
    for name in names:
        found = [flag for flag in script_flags(script) if flag.is_of((name,))]
        if not found:
            raise ValueError(f"{script} takes no flag of {name}")
        for flag in found:
            options.setdefault(flag.dest, _words(flag.rule, _value(settings, flag.key)))
    return options


def flags(**options: Any) -> str:
    """Returns quoted flags. None, False and an empty list give no flag, True gives the flag alone."""
    words = []
    for name, value in options.items():
        if value is None or value is False or value == []:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, str) and value.startswith("-"):  # argparse would read it as a flag
            words.append(f"{flag}={shlex.quote(value)}")
            continue
        words.append(flag)
        if value is not True:
            words += [shlex.quote(str(item)) for item in (value if isinstance(value, list) else [value])]
    return " ".join(words)


def help_text(description: str) -> str:
    """Replaces the Markdown links in a description with their targets."""
    return re.sub(r"\[[^]]*\]\(([^)]*)\)", r"docs/\1", description)


def _value(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = None if value is None else value.get(name)
    return value


def _words(rule: Mapping[str, Any], value: Any) -> Any:
    if isinstance(value, bool) and "x-switch" not in rule:
        return str(value).lower()
    if isinstance(value, Mapping):
        return [f"{name}={item if isinstance(item, str) else repr(item)}" for name, item in value.items()]
    return value


def _help(flag: Flag) -> str:
    text = help_text(flag.rule["description"]).replace("%", "%%")
    return text if flag.default is None else f"{text} (default: %(default)s)"


def _reading(flag: Flag) -> dict[str, Any]:
    """Returns the arguments of `add_argument` that parse the flag."""
    rule, kind = flag.rule, _type_of(flag.rule)
    if "x-switch" in rule:
        return {"action": "store_true"}
    if kind == "array":
        fixed = rule.get("minItems") == rule.get("maxItems") and rule.get("minItems")
        return {**_one(rule["items"], ()), "nargs": fixed or ("+" if rule.get("minItems") else "*")}
    if kind == "object":
        inner = rule["additionalProperties"]
        return {"type": _pair(inner), "nargs": "*", "metavar": _pair_name(inner)}
    return _one(rule, flag.also)


def _one(rule: Mapping[str, Any], also: tuple) -> dict[str, Any]:
    """Returns the arguments of `add_argument` that parse one value."""
    if "enum" in rule:
        choices = [value for value in (*rule["enum"], *also) if value is not None]
        return {"choices": choices, "type": type(choices[0])}
    if _type_of(rule) == "boolean":
        return {"type": _truth, "metavar": "true|false"}
    return {"type": Path if "x-path" in rule else _within(rule, also)}


def _type_of(rule: Mapping[str, Any]) -> str | None:
    kind = rule.get("type")
    return kind[0] if isinstance(kind, list) else kind


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _within(rule: Mapping[str, Any], also: tuple) -> Callable[[str], Any]:
    """Returns a function that parses a number or text and checks the schema's limits."""
    read = {"integer": int, "number": float}.get(_type_of(rule), str)
    limits = {
        "minimum": ("at least", lambda value, limit: value >= limit),
        "exclusiveMinimum": ("more than", lambda value, limit: value > limit),
        "maximum": ("at most", lambda value, limit: value <= limit),
        "exclusiveMaximum": ("less than", lambda value, limit: value < limit),
        "minLength": ("characters: at least", lambda value, limit: len(value) >= limit),
        "pattern": ("text that matches", lambda value, limit: re.search(limit, value)),
    }

    def convert(text: str) -> Any:
        value = read(text)
        for name, (words, holds) in limits.items():
            if name in rule and value not in also and not holds(value, rule[name]):
                raise argparse.ArgumentTypeError(f"found {text}, expected {words} {rule[name]}")
        return value

    convert.__name__ = _type_of(rule) or "text"  # argparse prints it if `read` fails
    return convert


def _pair(rule: Mapping[str, Any]) -> Callable[[str], tuple[str, Any]]:
    """Returns a function that parses NAME=VALUE."""
    convert = _within(rule, ())
    # A path may contain `=`; so may the name before a number.
    split = str.partition if rule["type"] == "string" else str.rpartition

    def read(text: str) -> tuple[str, Any]:
        name, equals, value = split(text, "=")
        try:
            if equals:
                return name, convert(value)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"found {text}, expected {_pair_name(rule)}")

    return read


def _pair_name(rule: Mapping[str, Any]) -> str:
    return "NAME=TEXT" if rule["type"] == "string" else "NAME=NUMBER"
