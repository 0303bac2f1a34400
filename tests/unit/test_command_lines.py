"""The scripts' flags and the rules' command lines match the schema, which alone defines them."""

from __future__ import annotations

import argparse
import ast
import importlib
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from snaketune.settings.command_line import defaults_of, flags, options_of, script_flags
from snaketune.settings.load import load_settings
from snaketune.settings.schema import SCHEMA, load_schema

CODE = Path(__file__).parents[2] / "workflow_scripts"
SCRIPTS = sorted(path.stem for path in CODE.glob("*.py"))
WITH_SETTINGS = [script for script in SCRIPTS if script_flags(script)]

# Flags with the name of another script's setting, but a different meaning.
OTHERS = {
    ("chat", "--dtype"): "of a model that is loaded to talk to it",
    ("chat", "--max-new-tokens"): "of a conversation, not of an evaluation",
    ("evaluate_model", "--batch-tokens"): "of conversations, not of answers",
    ("evaluate_model", "--dtype"): "of the evaluation, not of the training",
    ("evaluate_tool_calls", "--dtype"): "of the evaluation, not of the training",
    ("build_demo_model", "--seed"): "of random weights",
    ("diff_plans", "--global-batch"): "of a plan, which knows no training",
}

# Library defaults with the name of a setting, but a different meaning.
HOMONYMS = {
    ("batch_tokens", 2048),  # of conversations that are only read
    ("global_batch", 1),  # of a plan
    ("seed", 0),  # of random weights
    ("max_bad_share", 1.0),  # where bad lines are only counted
    ("rank", 0),  # a process
    ("mode", "loss"),  # of a forward pass
    ("backend", ""),  # of torch.distributed
    ("dropout", 0.0),  # of attention, as transformers calls it
}


class _Parsed(Exception):
    """Carries a script's parser out of its main function."""


@pytest.fixture
def parser_of(monkeypatch):
    """Returns a function that returns a script's parser."""

    def stop(parser, *args, **kwargs):
        raise _Parsed(parser)

    def get(script: str) -> argparse.ArgumentParser:
        module = importlib.import_module(script)
        with monkeypatch.context() as patch, pytest.raises(_Parsed) as caught:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop)
            patch.setattr(sys, "argv", [script])
            module.main()
        return caught.value.args[0]

    return get


def required(parser: argparse.ArgumentParser) -> list[str]:
    """Returns the fewest arguments that the parser accepts."""
    words = []
    for action in parser._actions:
        word = str(action.choices[0]) if action.choices else "1"
        if not action.option_strings and action.nargs not in ("?", "*"):
            words.append(word)
        elif action.required:
            words += [action.option_strings[0], word]
    return words


def stated(script: str) -> dict[str, object]:
    """Returns the default of each flag of a script, read from the schema without the code under test."""
    found = {}

    def walk(name: str, rule: dict, above: object) -> None:
        entry = rule.get("x-scripts", {}).get(script, above)
        for key, each in rule.get("properties", {}).items():
            walk(f"{name}-{key}" if name in ("lora",) else key, each, entry)
        if "properties" not in rule and entry is not None:
            form = entry if isinstance(entry, dict) else {"flag": entry}
            flag = form["flag"].replace("*", name).replace("_", "-")
            found[flag] = form["default"] if "default" in form else rule.get("default")

    for section in yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))["properties"].values():
        walk("", section, None)
    return found


@pytest.mark.parametrize("script", WITH_SETTINGS)
def test_without_flags_a_script_does_what_the_schema_says(script, parser_of):
    parser = parser_of(script)
    given = vars(parser.parse_args(required(parser)))
    defaults = stated(script)
    assert {flag: given[flag[2:].replace("-", "_")] for flag in defaults} == defaults
    assert defaults_of(script) == {flag[2:].replace("-", "_"): value for flag, value in defaults.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_states_a_setting_by_itself(script, parser_of):
    settings = {flag.name for each in WITH_SETTINGS for flag in script_flags(each)}
    own = {flag.name for flag in script_flags(script)}
    by_itself = {
        option
        for action in parser_of(script)._actions
        for option in action.option_strings
        if option in settings - own and action.default is not None
    }
    assert by_itself == {flag for each, flag in OTHERS if each == script}


def library_defaults() -> set[tuple[str, object, str]]:
    """Returns each parameter and field with a default other than None: name, value, file."""
    found = set()
    for path in CODE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            pairs = []
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                positional = [*node.args.posonlyargs, *node.args.args]
                pairs = zip(reversed(positional), reversed(node.args.defaults), strict=False)
                pairs = [*pairs, *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
                pairs = [(argument.arg, value) for argument, value in pairs]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                pairs = [(node.target.id, node.value)]
            for name, value in pairs:
                if isinstance(value, ast.Constant) and value.value is not None:
                    found.add((name, value.value, str(path.relative_to(CODE))))
    return found


def test_the_library_states_no_default_of_a_setting():
    """It reads them from the schema. A parameter named as a setting defaults to the schema's value, or to None."""
    flags_of_all = [flag for script in WITH_SETTINGS for flag in script_flags(script)]
    settings = {name for flag in flags_of_all for name in (flag.dest, flag.key.rpartition(".")[2])}
    stated = [each for each in library_defaults() if each[0] in settings]
    assert [each for each in stated if each[:2] not in HOMONYMS] == []


@pytest.fixture
def defaults(tmp_path, monkeypatch):
    """A run's default settings."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    config = {"model": {"path": "model"}, "data": {"processed_dir": "data"}, "runs": {"one": {}}}
    return load_settings(config, load_schema()).runs["one"]


def another(rule: dict) -> object:
    """Returns a value other than the default."""
    kind = rule.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if "enum" in rule:
        return next(value for value in rule["enum"] if value not in (None, rule.get("default")))
    if kind == "array":
        return [another(rule["items"])] * rule.get("minItems", 1)
    if kind == "object":
        return {
            "one=two" if rule["additionalProperties"]["type"] == "number" else "a": another(
                rule["additionalProperties"]
            )
        }
    if kind == "boolean":
        return not rule.get("default")
    if kind in ("integer", "number"):
        value = 0.5 if "exclusiveMaximum" in rule or "maximum" in rule else 12
        return value if kind == "number" else int(value)
    return (
        "7GB" if rule.get("pattern", "").endswith("B$") else rule.get("pattern") and "every 5" or "a 'b' $c=d"
    )


@pytest.mark.parametrize("script", WITH_SETTINGS)
def test_a_rule_says_to_a_script_what_the_settings_are(script, parser_of, defaults):
    parser = parser_of(script)
    if script == "ingest_dataset":  # no rule calls it
        return
    sections = list(dict.fromkeys(flag.key.partition(".")[0] for flag in script_flags(script)))
    changed = {section: dict(defaults[section]) for section in sections}
    for flag in script_flags(script):
        section, key, *inner = flag.key.split(".")
        if inner:
            changed[section][key] = (changed[section][key] or {}) | {inner[0]: another(flag.rule)}
        else:
            changed[section][key] = another(flag.rule)
    for settings in (defaults, changed):
        words = shlex.split(flags(**options_of(script, settings, *sections)))
        given = vars(parser.parse_args([*required(parser), *words]))
        for flag in script_flags(script):
            value = settings
            for name in flag.key.split("."):
                value = value and value.get(name)
            read = given[flag.dest]
            if isinstance(value, dict):
                read = dict(read or {})
            elif value is None:
                value = flag.default
            elif isinstance(read, Path):
                read = str(read)
            assert read == value, flag


@pytest.mark.parametrize("script", WITH_SETTINGS)
def test_what_a_rule_leaves_out_is_what_a_script_does_without_it(script):
    """None, False and an empty list give no flag."""
    for flag in script_flags(script):
        kind = flag.rule.get("type", ())
        if "null" in kind or None in flag.rule.get("enum", ()):
            assert flag.default is None, flag
        if kind == "array" and "minItems" not in flag.rule:
            assert flag.default == [], flag
        if "x-switch" in flag.rule:
            assert flag.default is False, flag


def test_flags_of_older_results_stand_where_they_stood(defaults):
    """Snakemake compares the text, so new flags come last."""
    words = flags(**options_of("render_train_config", defaults, "train")).removeprefix("--max-length 32768 ")
    assert words.startswith(
        "--lr 4e-05 --min-lr-ratio 0.15 --betas 0.9 0.95 --weight-decay 0.01 --max-norm 1.0 --warmup-ratio 0.025"
        " --max-epochs 1 --accumulative-counts 1 --max-skipped-steps 3 --zero-stage 2 --offload none --zero3-init false"
        " --sequence-parallel 1 --loss-normalisation token --cross-entropy chunked --save-steps 500"
        " --save-total-limit 2 --save-optimizer true --gradient-checkpointing true --dtype auto --attention auto"
        " --seed 42 --eval-steps 0 --generate-steps 0"
    )
    words = flags(**options_of("tokenize_dataset", defaults, "tokenize"))
    assert words.startswith("--template internlm2_chat --mask")
    assert (
        "--control-tokens literal --valid" in words
        and "--valid-share 0.01 --valid-seed 1024 --on-bad" in words
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr", "0"], "argument --lr: found 0, expected more than 0"),
        (["--lr", "fast"], "argument --lr: invalid number value: 'fast'"),
        (["--max-steps", "1.5"], "argument --max-steps: invalid integer value: '1.5'"),
        (["--warmup-ratio", "1"], "argument --warmup-ratio: found 1, expected less than 1"),
        (["--save-total-limit", "0"], "argument --save-total-limit: found 0, expected at least 1"),
        (["--zero-stage", "4"], "argument --zero-stage: invalid choice: 4"),
        (["--betas", "0.9"], "argument --betas: expected 2 arguments"),
        (["--zero3-init", "yes"], "argument --zero3-init: 'yes' is neither true nor false"),
        (["--lora-dropout", "1"], "argument --lora-dropout: found 1, expected less than 1"),
    ],
)
def test_a_flag_holds_the_limits_of_the_schema(words, said, parser_of, capsys):
    with pytest.raises(SystemExit):
        parser_of("render_train_config").parse_args(["--output", "x", *words])
    assert said in capsys.readouterr().err


def test_a_script_may_take_more_than_the_workflow(parser_of):
    words = ["--output", "x", "--save-total-limit", "-1", "--dtype", "float16"]
    given = parser_of("render_train_config").parse_args(words)
    assert (given.save_total_limit, given.dtype) == (-1, "float16")
