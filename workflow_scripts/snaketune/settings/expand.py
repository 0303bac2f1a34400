"""Expands entries of `runs:` that define several runs into ordinary runs, before anything else reads them.

    sweep:                                      # sweep-lr1e-05-zero_stage1, sweep-lr1e-05-zero_stage2, ...
      matrix: {train.lr: [1.0e-5, 4.0e-5], train.zero_stage: [1, 2]}
    ablate: {leave_one_out: datasets}           # ablate-all, ablate-without-<dataset>, ...

The other keys of an entry apply to all its runs. See docs/runs.md.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from snaketune.chat_files.processed_layout import find_datasets
from snaketune.common.cli import UserError
from snaketune.settings.keys import SECTIONS, unknown_key

SPREADS = ("matrix", "leave_one_out")
MOST_RUNS = 64
_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


class _Choice(NamedTuple):
    """One value on one axis: its label in run names, its key (section, key, optionally one more), the value.

    A choice without a key sets nothing.
    """

    label: str
    key: tuple[str, ...]
    value: Any


def expand_entries(
    config: Mapping[str, Any], schema: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the overrides of each run by name, for each entry of `runs:`. Most entries define one run.

    Args:
        config: The raw configuration; its `runs` match the schema.
        schema: The JSON schema, with all keys.

    Raises:
        UserError: A key or dataset is unknown, an entry has too many runs, or two runs have the same name.
    """
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    names: set[str] = set()
    for entry, own in config["runs"].items():
        own = own or {}
        several = any(key in own for key in SPREADS)
        runs = entries[entry] = {}
        for name, run in _spread(entry, own, config, schema) if several else [(entry, own)]:
            if name in names:
                raise UserError(
                    f"config: two runs are named {name}",
                    found=f"one of them from runs.{entry}",
                    fix="rename one of the entries under `runs:`, or choose values that give different names",
                )
            names.add(name)
            runs[name] = run
    return entries


def _spread(entry: str, own: Mapping[str, Any], config: Mapping[str, Any], schema: Mapping[str, Any]):
    where = f"runs.{entry}"
    common = {section: values for section, values in own.items() if section not in SPREADS}
    axes = []
    if "leave_one_out" in own:
        axes.append(_left_out(f"{where}.leave_one_out", own["leave_one_out"], common, config))
    axes += _axes(f"{where}.matrix", own.get("matrix", {}), common, schema)
    count = 1
    for axis in axes:
        count *= len(axis)
    if count > MOST_RUNS:
        raise UserError(
            f"config: {where} defines {count} runs",
            expected=f"at most {MOST_RUNS} per entry",
            fix="shorten the lists, or split the entry",
        )
    for choices in itertools.product(*axes):
        run = copy.deepcopy(common)
        for choice in choices:
            if choice.key:
                _put(run, config, choice)
        yield "-".join([entry, *(choice.label for choice in choices)]), run


def _axes(where: str, matrix: Mapping[str, list], common: Mapping[str, Any], schema) -> list[list[_Choice]]:
    keys = {full: _key(f"{where}.{full}", full, schema) for full in matrix}
    last = [key[-1] for key in keys.values()]
    axes = []
    for full, key in keys.items():
        above = [other for other in keys if other != full and keys[other] == key[: len(keys[other])]]
        given = common.get(key[0]) or {}
        inner = given.get(key[1]) if len(key) == 3 else None
        if above or (key[1] in given if len(key) == 2 else key[2] in (inner or {})):
            raise UserError(
                f"config: {full} has a list in {where} and is also set elsewhere",
                found=", ".join(above) or f"{where.removesuffix('.matrix')}.{full}",
                fix="remove one of the two",
            )
        # The label is the last part of the key if that is unique.
        name = key[-1] if last.count(key[-1]) == 1 else full
        axes.append([_Choice(_label(name, value), key, value) for value in matrix[full]])
    return axes


def _key(where: str, full: str, schema: Mapping[str, Any]) -> tuple[str, ...]:
    section, _, rest = full.partition(".")
    if section not in SECTIONS:
        raise unknown_key(where, section, SECTIONS)
    known = schema["properties"][section]["properties"]
    name, _, inner = rest.partition(".")
    if name not in known:
        raise unknown_key(where, name, known)
    if not inner:
        return section, name
    parts = known[name].get("properties", {})
    if inner not in parts and not isinstance(known[name].get("additionalProperties"), dict):
        raise unknown_key(where, inner, parts or [f"{section}.{name}"])
    return section, name, inner


def _label(name: str, value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return _NAME.sub("-", f"{name}{'' if number else '_'}{_text(value)}").rstrip("-.")


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, dict):
        return "_".join(f"{key}{_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "_".join(map(_text, value))
    return PurePath(value).name if isinstance(value, str) else str(value)


def _left_out(where: str, value: str | list[str], common, config: Mapping[str, Any]) -> list[_Choice]:
    data = {**(config.get("data") or {}), **(common.get("data") or {})}
    if not data.get("processed_dir"):
        raise UserError(
            "config: data.processed_dir is missing", fix=f"set it: {where} looks for datasets there"
        )
    datasets = data.get("datasets") or list(find_datasets(data["processed_dir"]))
    names = datasets if value == "datasets" else value
    if isinstance(names, str):
        raise UserError(
            f"config: invalid value for {where}",
            found=names,
            expected="`datasets`, or a list of dataset names",
        )
    for name in names:
        if name not in datasets:
            raise unknown_key(f"{where}.{name}", name, datasets)
    if len(datasets) < 2:
        raise UserError(
            f"config: {where} would leave nothing to train on",
            found=f"only one dataset, {datasets[0]}",
            fix="remove it, or add a dataset",
        )
    left = [
        _Choice(f"without-{_NAME.sub('-', name).rstrip('-.')}", ("packing", "weights", name), 0)
        for name in names
    ]
    return [_Choice("all", (), None), *left]


def _put(run: dict[str, Any], config: Mapping[str, Any], choice: _Choice) -> None:
    section, name, *inner = choice.key
    value = copy.deepcopy(choice.value)
    own = run[section] = dict(run.get(section) or {})
    if inner:
        # Set one entry and keep the rest of the mapping that the run would have.
        before = own[name] if name in own else (config.get(section) or {}).get(name)
        value = {**(before or {}), inner[0]: value}
    own[name] = value
