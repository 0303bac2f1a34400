"""Reads chat templates from YAML files, which define the text and the trained parts of each role.

`docs/templates.md` explains the keys. The templates shipped with SnakeTune are in `templates/` beside this module.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

try:  # equally safe and several times faster, if PyYAML was built with libyaml
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeLoader

from snaketune.chat_format.chat_template import ChatTemplate, Role
from snaketune.common.cli import UserError

TEMPLATE_FILE = "chat_template.yaml"  # stored with a tokenizer and a model
_FOLDER = Path(__file__).parent / "templates"
_KEYS = {
    "description": str,
    "special_tokens": list,
    "end_of_turn": str,
    "bos": bool,
    "names": dict,
    "roles": dict,
}
_NAME_KEYS = {
    "begin": str,
    "named_begin": (str, type(None)),
    "end": str,
    "opens": (str, type(None)),
}
_ROLE_KEYS = {
    **_NAME_KEYS,
    "map_names": bool,
    "trained": bool,
    "types": dict,
    "part_of": str,
    "by_name": dict,
}
_WORDS = {str: "a string", list: "a list", bool: "true or false", dict: "a mapping"}
_ROLE_NAME = re.compile(r"[A-Za-z][\w-]*")
_DOCS = "see docs/templates.md, and the shipped templates for examples"


def shipped_templates() -> list[str]:
    """Returns the names of the templates shipped with SnakeTune."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_template(name: str | os.PathLike) -> ChatTemplate:
    """Loads a shipped template or a template file.

    Args:
        name: A name such as `llama3`, or the path of a YAML file.

    Raises:
        UserError: The template does not exist or is invalid. The error names the file and the key.
    """
    if str(name) in shipped_templates():
        return _load_shipped(str(name))
    return _read(template_path(name))


def template_path(name: str | os.PathLike) -> Path:
    """Returns the path of a template's file. `name` is as in `load_template`.

    Raises:
        UserError: The template does not exist.
    """
    path = _FOLDER / f"{name}.yaml" if str(name) in shipped_templates() else Path(name)
    if not path.is_file():
        raise UserError(
            f"no chat template {str(name)!r}",
            expected=f"{', '.join(shipped_templates())}, or the path of a template file",
            fix="correct the template's name (config: tokenize.template)",
        )
    return path


def check_mask(template: ChatTemplate, mask: str) -> None:
    """Raises a UserError for `compat` with any template other than InternLM2's: XTuner has masks for no other."""
    if mask == "compat" and template != load_template("internlm2_chat"):
        raise UserError(
            "mask: compat reproduces XTuner's trained tokens, and XTuner has only the template internlm2_chat",
            found=f"template {template.name} with mask compat",
            expected="mask exact with this template",
            fix="set tokenize.mask: exact in the config (--mask exact on the command line)",
        )


def parse_template(text: str, name: str, where: str | os.PathLike) -> ChatTemplate:
    """Parses the text of a template file.

    Args:
        text: YAML.
        name: The template's name.
        where: Name of the source, for error messages.

    Raises:
        UserError: The text is invalid. The error names the key.
    """
    try:
        description = yaml.load(text, Loader=SafeLoader)
    except yaml.YAMLError as error:
        raise _not_yaml(where, error) from None
    _check_keys(description, _KEYS, where, "")
    for key in ("special_tokens", "end_of_turn", "roles"):
        if key not in description:
            raise _error(where, key, "nothing", "this key")
    tokens = description["special_tokens"]
    for place, token in enumerate(tokens):
        if type(token) is not str or not token or tokens.index(token) != place:
            raise _error(where, f"special_tokens[{place}]", repr(token), "a token that is listed once")
    if not description["end_of_turn"]:
        raise _error(where, "end_of_turn", "''", "the token that ends an answer")
    names = description.get("names", {})
    for key, value in names.items():
        if type(key) is not str or type(value) is not str:
            raise _error(where, f"names.{key}", repr(value), "a string")
    said = description["roles"]
    for key in said:
        if type(key) is not str or not _ROLE_NAME.fullmatch(key):
            raise _error(
                where, f"roles.{key}", repr(key), "a name of letters, digits, - and _, with a letter first"
            )
    if "assistant" not in said:
        raise _error(where, "roles", ", ".join(said) or "no role", "a role named assistant")
    roles = {key: _role(key, value, said, where) for key, value in said.items()}
    if not any(role.trained for role in roles.values()):
        raise _error(where, "roles", "no role with trained: true", "at least one, usually assistant")
    return ChatTemplate(
        name=name,
        special_tokens=tuple(tokens),
        end_of_turn=description["end_of_turn"],
        bos=description.get("bos", True),
        names=names,
        roles=roles,
        text=text,
    )


@functools.cache
def _load_shipped(name: str) -> ChatTemplate:
    return _read(_FOLDER / f"{name}.yaml")


def _read(path: Path) -> ChatTemplate:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _not_yaml(path, error) from None
    return parse_template(text, path.stem, path)


def _not_yaml(where: str | os.PathLike, error: Exception) -> UserError:
    return UserError(f"{where} cannot be read as YAML", found=error, expected="a chat template", fix=_DOCS)


def _role(name: str, said: Any, every: Mapping[str, Any], where: str | os.PathLike) -> Role:
    at = f"roles.{name}"
    said = {} if said is None else said  # a role without keys
    _check_keys(said, _ROLE_KEYS, where, f"{at}.")
    part_of, opens = said.get("part_of"), said.get("opens")
    for key, target in (("part_of", part_of), ("opens", opens)):
        makes_turns = isinstance(every.get(target), dict) and not {"part_of", "opens"} & set(every[target])
        if target is not None and (target == name or not makes_turns):
            raise _error(where, f"{at}.{key}", repr(target), "another role that makes its own turns")
    if part_of is not None:
        useless = [key for key in ("opens", "trained", "types") if key in said]
        if useless:
            raise _error(where, f"{at}.{useless[0]}", repr(said[useless[0]]), f"nothing: {part_of} decides")
    trained = said.get("trained", False)
    if trained and opens is not None:
        raise _error(where, f"{at}.trained", "true", "false: the text is part of another role's turn")
    types = said.get("types", {"icl": trained, "current": trained, "prefix": False})
    for kind, value in types.items():
        if type(kind) is not str or type(value) is not bool:
            raise _error(where, f"{at}.types.{kind}", repr(value), "true or false")
        if value and not trained:
            raise _error(where, f"{at}.types.{kind}", "true", "false, or trained: true for the role")
    role = Role(
        name=name,
        prefix=said.get("begin", ""),
        suffix=said.get("end", ""),
        named=_named(said.get("named_begin"), where, f"{at}.named_begin"),
        map_names=said.get("map_names", True),
        types=types,
        trained=trained,
        part_of=part_of,
        opens=opens,
    )
    by_name = {}
    for key, value in said.get("by_name", {}).items():
        here = f"{at}.by_name.{key}"
        if type(key) is not str:
            raise _error(where, here, repr(key), "a name in quotes")
        _check_keys(value, _NAME_KEYS, where, f"{here}.")
        if value.get("opens", opens) not in (None, opens):
            raise _error(where, f"{here}.opens", repr(value["opens"]), "null, or the role's own value")
        # A prefix for one name already contains that name.
        named = _named(value.get("named_begin"), where, f"{here}.named_begin")
        by_name[key] = Role(
            **{
                **{each: getattr(role, each) for each in ("map_names", "types", "trained", "part_of")},
                "name": name,
                "prefix": value.get("begin", role.prefix),
                "suffix": value.get("end", role.suffix),
                "named": named,
                "opens": value.get("opens", opens),
            }
        )
    return Role(**{**vars(role), "by_name": by_name}) if by_name else role


def _named(text: str | None, where: str | os.PathLike, key: str) -> tuple[str, str] | None:
    if text is None:
        return None
    before, found, after = text.partition("{name}")
    if not found or "{name}" in after:
        raise _error(where, key, repr(text), "a string that contains {name} once")
    return before, after


def _check_keys(said: Any, known: Mapping[str, Any], where: str | os.PathLike, prefix: str) -> None:
    if type(said) is not dict:
        raise _error(where, prefix.rstrip(".") or "file", repr(said), "a mapping of keys")
    for key, value in said.items():
        if key not in known:
            raise _error(where, f"{prefix}{key}", "an unknown key", "one of " + ", ".join(known))
        types = known[key] if isinstance(known[key], tuple) else (known[key],)
        if type(value) not in types:
            raise _error(where, f"{prefix}{key}", repr(value), _WORDS[types[0]])


def _error(where: str | os.PathLike, key: str, found: str, expected: str) -> UserError:
    return UserError(f"{where}: invalid {key}", found=found, expected=expected, fix=_DOCS)
