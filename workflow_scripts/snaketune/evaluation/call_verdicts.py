"""Judges an answer: whether it calls a tool, and whether the call is valid and matches the reference.

Nothing that a model writes is executed: JSON and code are only parsed.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snaketune.evaluation.call_format import Call

INTERPRETER = "interpreter"
# The checks of a call, in order: each one requires that the earlier ones passed.
STAGES = ("control_tokens", "json", "tool", "arguments")
_ARGUMENTS = ("arguments", "parameters")
_FENCE = re.compile(r"\s*```([A-Za-z0-9_+-]*)[ \t]*\n(.*?)\n?```\s*", re.S)


@dataclass(frozen=True)
class Offered:
    """The tools that a conversation offers before an answer.

    Attributes:
        tools: Name -> JSON schema of the arguments, or None without one.
        known: False if the conversation does not list its tools in a format we can read; every name is then
            accepted.
        interpreter: True if code can be run; None if the conversation does not say.
    """

    tools: Mapping[str, Any] = field(default_factory=dict)
    known: bool = True
    interpreter: bool | None = False


def offered_tools(messages: Sequence[Mapping[str, Any]], before: int) -> Offered:
    """Returns the tools that the system messages named `plugin` and `interpreter` offer before a message.

    `plugin` holds a JSON list of `{"name", "parameters"}` (or of `{"type": "function", "function": {...}}`).
    If a conversation calls a tool other than the interpreter and has no `plugin` message, its tools are
    unknown.

    Args:
        messages: The whole conversation.
        before: Index of the message.
    """
    called = {message.get("name") for message in messages if message["role"] == "tool"}
    system = [message for message in messages[:before] if message["role"] == "system"]
    interpreter = any(message.get("name") == INTERPRETER for message in system)
    lists = [message["content"] for message in system if message.get("name") == "plugin"]
    tools: dict[str, Any] = {}
    known = bool(lists) or not called - {INTERPRETER}
    for text in lists:
        try:
            entries = json.loads(text)
        except ValueError:
            known = False
            continue
        for entry in entries if isinstance(entries, list) else [entries]:
            entry = entry.get("function", entry) if isinstance(entry, dict) else None
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                known = False
                continue
            tools[entry["name"]] = entry.get("parameters")
    return Offered(tools, known, interpreter or (None if INTERPRETER in called else False))


@dataclass(frozen=True)
class Judged:
    """A parsed and checked call.

    Attributes:
        tool: The name given by the control tokens.
        name: The tool named in the JSON; None for code and for invalid calls.
        arguments: Its arguments; None without a name.
        value: The value compared in an exact match.
        stage: The first of `STAGES` that fails; None if none does.
        problem: The failure in words.
        code: True if the call is code.
    """

    tool: str | None
    name: str | None
    arguments: dict | None
    value: str
    stage: str | None
    problem: str | None
    code: bool


def judge_call(call: Call, offered: Offered) -> Judged:
    """Checks the control tokens, the JSON (or the code's syntax), the name and the arguments of a call."""
    code = call.tool == INTERPRETER or (
        call.tool is None and offered.interpreter is not False and not offered.tools
    )
    if code:
        stage, problem = _check_code(call.body, offered)
        name, arguments, value = None, None, call.body
    else:
        stage, problem, name, arguments, value = _check_json(call.body, offered)
    if call.problem:
        stage, problem = STAGES[0], call.problem
    return Judged(call.tool, name, arguments, value, stage, problem, code)


def verdicts(
    calls: Sequence[Call], references: Sequence[Call], offered: Offered, stopped: bool
) -> dict[str, Any]:
    """Returns the verdicts on one answer.

    Args:
        calls: The answer's calls.
        references: The reference's calls; empty if it answers in text.
        offered: The tools that it may call.
        stopped: True if the answer ended with the right token within the limit.

    Returns:
        Always `called` and `stopped`. If the answer calls: `failed` (the first of `STAGES` that a call fails,
        or None) and `problem`. If the reference calls: `reference_failed`; `exact`, True if JSON or code and
        the control tokens around it are the same; `name`, True if the tools are the same; `argument_f1` (None
        for code). Calls are compared with the reference's by position.
    """
    judged = [judge_call(call, offered) for call in calls]
    result: dict[str, Any] = {"called": bool(calls), "stopped": stopped}
    if calls:
        worst = _first_failure(judged)
        result |= {"failed": worst and worst.stage, "problem": worst and worst.problem}
    if references:
        right = [judge_call(call, offered) for call in references]
        failed = _first_failure(right)
        result |= {
            "reference_failed": failed and failed.stage,
            "exact": all(each.stage != STAGES[0] for each in judged)
            and [(each.tool, each.value) for each in judged] == [(each.tool, each.value) for each in right],
            "name": [(each.tool, each.name) for each in judged] == [(each.tool, each.name) for each in right],
            "argument_f1": _argument_f1(judged, right),
        }
    return result


def _first_failure(judged: Sequence[Judged]) -> Judged | None:
    failed = [each for each in judged if each.stage]
    return min(failed, key=lambda each: STAGES.index(each.stage)) if failed else None


def _check_code(body: str, offered: Offered) -> tuple[str | None, str | None]:
    fenced = _FENCE.fullmatch(body)
    language, source = fenced.groups() if fenced else ("", body)
    if not source.strip():
        return "json", "empty code"
    if language.lower() in ("", "py", "python", "python3"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return "json", f"invalid Python: {error}"[:200]
    if offered.interpreter is False:
        return "tool", "no interpreter is offered"
    return None, None


def _check_json(body: str, offered: Offered) -> tuple[str | None, str | None, str | None, dict | None, str]:
    """Returns (failed stage, problem, name, arguments, canonical value)."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return "json", f"invalid JSON: {error}"[:200], None, None, body
    canonical = _canonical(value)
    name = value.get("name") if isinstance(value, dict) else None
    arguments = _arguments(value) if isinstance(value, dict) else None
    if not isinstance(name, str) or arguments is None:
        return "json", "not an object with a name and an object of arguments", None, None, canonical
    if offered.known and name not in offered.tools:
        return "tool", f"{name!r} is not an offered tool", name, arguments, canonical
    problem = _schema_problem(arguments, offered.tools.get(name))
    return ("arguments" if problem else None), problem, name, arguments, canonical


def _arguments(value: dict) -> dict | None:
    """Returns the arguments of a call: {} if it has none, None if they are not an object."""
    for key in _ARGUMENTS:
        arguments = value.get(key)
        if isinstance(arguments, str):
            # Some formats write the arguments as JSON inside a string.
            try:
                arguments = json.loads(arguments, parse_constant=_no_constant)
            except (ValueError, RecursionError):
                return None
        if arguments is not None:
            return arguments if isinstance(arguments, dict) else None
    return {}


def _schema_problem(arguments: dict, schema: Any) -> str | None:
    """Returns how the arguments violate their schema; None if they do not or if the schema is unusable."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match
    from referencing import Registry

    if not isinstance(schema, dict):
        return None
    try:
        Draft202012Validator.check_schema(schema)
        # An empty registry, so that a schema cannot make us fetch its references.
        error = best_match(Draft202012Validator(schema, registry=Registry()).iter_errors(arguments))
    except Exception:  # unknown dialect, invalid pattern or external reference
        return None
    if error is None:
        return None
    where = "".join(f"[{part!r}]" for part in error.absolute_path)
    return f"arguments{where}: {error.message}"[:200]


def _argument_f1(judged: Sequence[Judged], right: Sequence[Judged]) -> float | None:
    """F1 over the leaves of the arguments, (path, value); calls of different tools have no leaf in common."""
    if any(each.code or each.name is None for each in right):
        return None
    same = given = wanted = 0
    for place in range(max(len(judged), len(right))):
        mine = _leaves(judged[place].arguments) if place < len(judged) else Counter()
        theirs = _leaves(right[place].arguments) if place < len(right) else Counter()
        given, wanted = given + mine.total(), wanted + theirs.total()
        if place < min(len(judged), len(right)) and judged[place].name == right[place].name:
            same += (mine & theirs).total()
    if not given + wanted:
        return float([each.name for each in judged] == [each.name for each in right])
    return 2 * same / (given + wanted)


def _leaves(value: Any, path: tuple = ()) -> Counter:
    if value is None and not path:
        return Counter()
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    leaves: Counter = Counter()
    for key, each in entries:
        leaves += _leaves(each, (*path, key))
    if not leaves and path:
        leaves[path, _canonical(value)] = 1
    return leaves


def _canonical(value: Any) -> str:
    """Returns JSON with sorted keys in which 2 and 2.0 are equal (and true is not a number)."""
    return json.dumps(_plain_numbers(value), sort_keys=True, ensure_ascii=False)


def _plain_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(each) for each in value]
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
