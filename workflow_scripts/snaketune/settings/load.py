"""Turns the raw configuration into one checked, complete settings tree per run.

Precedence: a run's own keys, then the shared sections beside `runs:`, then the schema's defaults.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from snaketune.chat_format.template_file import check_mask, load_template
from snaketune.common.cli import UserError
from snaketune.settings.expand import SPREADS, expand_entries
from snaketune.settings.keys import SECTIONS, unknown_key


@dataclass(frozen=True)
class Settings:
    """The whole configuration.

    Attributes:
        results_dir: Folder for all results.
        environments: Python interpreters of the other environments.
        runs: Merged sections of each run, by name.
        compared: Names of the runs that `compare` shows side by side, baseline first.
    """

    results_dir: str
    environments: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    compared: list[str]


def load_settings(config: dict, schema: dict) -> Settings:
    """Checks a raw configuration, fills in defaults, merges each run and checks that its paths exist.

    Raises:
        UserError: On the first error, with the key, the value found and the fix.
    """
    _validate(config, schema)
    shared = {name: config.get(name) or {} for name in SECTIONS}
    properties = schema["properties"]
    environments = _defaults(properties["environments"]) | (config.get("environments") or {})
    runs = {}
    entries = expand_entries(config, schema)
    for name, overrides in itertools.chain(*(each.items() for each in entries.values())):
        prefix = f"runs.{name}."
        for key in overrides:
            if key not in SECTIONS:
                raise unknown_key(prefix + key, key, (*SECTIONS, *SPREADS))
        merged = {
            section: _defaults(properties[section]) | shared[section] | (overrides.get(section) or {})
            for section in SECTIONS
        }
        for section in SECTIONS:
            _validate_part(
                overrides.get(section) or {}, properties[section], f"{prefix}{section}", partial=True
            )
            _validate_part(merged[section], properties[section], section)
            _check_paths(merged[section], properties[section], section)
        _check_run(merged, name)
        runs[name] = merged
    results_dir = config.get("results_dir", properties["results_dir"]["default"])
    return Settings(results_dir, environments, runs, _compared(config.get("compare") or {}, entries))


def _compared(settings: dict, entries: dict[str, dict]) -> list[str]:
    runs = {run: [run] for run in itertools.chain(*entries.values())}
    known = runs | entries
    for key, names in (("runs", settings.get("runs") or []), ("baseline", [settings.get("baseline")])):
        for name in names:
            if name is not None and name not in (known if key == "runs" else runs):
                raise unknown_key(f"compare.{key}.{name}", name, known if key == "runs" else runs)
    chosen = dict.fromkeys(itertools.chain(*(known[name] for name in settings.get("runs") or entries)))
    baseline = settings.get("baseline") or next(iter(chosen))
    return [baseline, *(run for run in chosen if run != baseline)]


def _defaults(section: dict) -> dict:
    """Returns copies of the defaults of a section's keys. Keys without a default are skipped."""
    keys = section["properties"].items()
    return {key: copy.deepcopy(value["default"]) for key, value in keys if "default" in value}


def _validate(config: dict, schema: dict) -> None:
    relaxed = copy.deepcopy(schema)
    # A shared section may be incomplete: `required` is checked on each run's merged section.
    for section in SECTIONS:
        relaxed["properties"][section].pop("required", None)
    _validate_part({key: value for key, value in config.items() if value is not None}, relaxed, "")


def _validate_part(value: dict, schema: dict, where: str, partial: bool = False) -> None:
    if partial:
        schema = {key: item for key, item in schema.items() if key != "required"}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(value)
    error = min(errors, key=lambda item: [str(part) for part in item.absolute_path], default=None)
    if error is not None:
        raise _explain(error, where)


def _explain(error: jsonschema.ValidationError, where: str) -> UserError:
    key = ".".join([where, *map(str, error.absolute_path)] if where else map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        unknown = next(name for name in error.instance if name not in known)
        return unknown_key(f"{key}.{unknown}" if key else unknown, unknown, known)
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        full = f"{key}.{missing}" if key else missing
        return UserError(f"config: {full} is missing", fix=f"add it; see {full} in docs/config.md")
    found = f"{error.instance!r} ({_yaml_type(error.instance)})"
    if error.validator in ("pattern", "not") and "propertyNames" in error.absolute_schema_path:
        return UserError(
            f"config: invalid run name {error.instance!r}",
            expected="letters, digits, '_', '.' and '-', starting with a letter or digit; not shared, logs, benchmarks or compare",
            fix="rename the run under `runs:`",
        )
    expected, fix = _expected(error), None
    number = _number_in_a_string(error.instance)
    if error.validator == "type" and number is not None and "number" in str(error.validator_value):
        fix = f"write {number} (YAML reads a number in e-notation only with a dot and no quotes)"
    elif error.schema.get("description"):
        fix = f"see docs/config.md: {error.schema['description']}"
    return UserError(f"config: invalid value for {key}", found=found, expected=expected, fix=fix)


def _expected(error: jsonschema.ValidationError) -> str:
    words = {
        "minimum": "at least",
        "maximum": "at most",
        "exclusiveMinimum": "more than",
        "exclusiveMaximum": "less than",
        "enum": "one of",
        "type": "",
        "pattern": "text that matches",
        "minItems": "a list of at least",
        "maxItems": "a list of at most",
        "minProperties": "entries: at least",
    }
    value = error.validator_value
    if isinstance(value, list):
        joined = " or ".join if error.validator == "type" else ", ".join
        value = joined(str(item) for item in value)
    return f"{words.get(error.validator, error.validator)} {value}".strip()


def _yaml_type(value: Any) -> str:
    names = {bool: "boolean", str: "string", int: "integer", float: "number", list: "list", dict: "mapping"}
    return "empty" if value is None else names.get(type(value), type(value).__name__)


def _number_in_a_string(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    mantissa, e, exponent = value.lower().partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}{e}{exponent}" if e else value


def _check_paths(section: dict, schema: dict, name: str) -> None:
    for key, rule in schema["properties"].items():
        kind, value = rule.get("x-path"), section.get(key)
        if kind is None or value is None:
            continue
        if not (Path(value).is_dir() if kind == "folder" else Path(value).is_file()):
            hint = (
                "run `make setup` first: it creates the demo's files"
                if value.startswith("resources/")
                else None
            )
            raise UserError(
                f"config: {name}.{key} names a {kind} that does not exist",
                found=value,
                expected=f"an existing {kind}, absolute or relative to {Path.cwd()}",
                fix=hint or "correct the path, or put the files there",
            )


def _check_run(run: dict, name: str) -> None:
    model, tokenizer = run["model"], run["tokenizer"]
    if (model["path"] is None) == (model["hub"] is None):
        raise UserError(
            f"config: run {name!r} needs exactly one of model.path and model.hub",
            found=f"path: {model['path']}, hub: {model['hub']}",
            fix="set model.path to a local folder, or model.hub to a name on the hub",
        )
    if model["path"] is not None and not (Path(model["path"]) / "config.json").is_file():
        raise UserError(
            "config: model.path is not a Hugging Face model folder",
            found=f"{model['path']} has no config.json",
            fix="point model.path at the folder that holds config.json and the safetensors files",
        )
    folder = tokenizer["path"] or model["path"]
    if folder is not None and not any(
        (Path(folder) / f).is_file() for f in ("tokenizer.json", "tokenizer.model")
    ):
        raise UserError(
            "config: no tokenizer found",
            found=f"{folder} has neither tokenizer.json nor tokenizer.model",
            fix="point tokenizer.path at a folder that has one of them",
        )
    check_mask(load_template(run["tokenize"]["template"]), run["tokenize"]["mask"])
    train = run["train"]
    if train["lora"] is not None and train["zero3_init"]:
        raise UserError(
            f"config: run {name!r} combines LoRA with zero3_init",
            expected="a model that is loaded whole; zero_stage 3 shards it after loading",
            fix="set train.zero3_init: false",
        )
    if train["generate_steps"] and run["evaluate"]["prompts"] is None:
        raise UserError(
            f"config: run {name!r} has train.generate_steps, but no prompts",
            fix="set evaluate.prompts to a JSON file, such as docs/examples/prompts.json",
        )
    evaluate = run["evaluate"]
    if (
        evaluate["checkpoints"] != "none"
        and evaluate["best_metric"] != "loss"
        and not run["tool_calls"]["enabled"]
    ):
        raise UserError(
            f"config: run {name!r} has evaluate.best_metric: {evaluate['best_metric']}, but tool_calls.enabled: false",
            fix="set tool_calls.enabled: true, or evaluate.best_metric: loss",
        )
    if run["heldout"]["processed_dir"] is None and run["heldout"]["share"] == 0:
        raise UserError(
            f"config: run {name!r} has nothing to evaluate on",
            found="heldout.processed_dir is empty and heldout.share is 0",
            fix="set heldout.share (0.05 holds out 5% of the lines) or heldout.processed_dir",
        )
    _check_opencompass(run, name)


def _check_opencompass(run: dict, name: str) -> None:
    settings = run["opencompass"]
    if not settings["enabled"]:
        return
    for each, path in settings["custom"].items():
        if not Path(path).is_file():
            raise UserError(
                f"config: opencompass.custom.{each} names a file that does not exist",
                found=path,
                expected=f"a JSONL file, absolute or relative to {Path.cwd()}",
                fix="correct the path, or put the file there",
            )
    if not settings["groups"] and not settings["custom"]:
        raise UserError(
            f"config: run {name!r} has opencompass.enabled: true, but no datasets",
            fix="add groups to opencompass.groups, or your own sets to opencompass.custom",
        )
    if settings["backend"] == "turbomind" and not run["turbomind"]["enabled"]:
        raise UserError(
            f"config: run {name!r} has opencompass.backend: turbomind, but turbomind.enabled: false",
            fix="set turbomind.enabled: true, or opencompass.backend: hf",
        )
