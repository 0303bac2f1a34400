"""The docs match the code: links, files, commands and flags, config keys, rules, targets."""

from __future__ import annotations

import copy
import functools
import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import jsonschema
import pytest
import yaml

from snaketune.chat_format.jinja_template import reads_openai_tools
from snaketune.chat_format.template_file import load_template, shipped_templates
from warm import PARENT

REPO = Path(__file__).resolve().parents[2]
ENGLISH = [REPO / "README.md", REPO / "profiles" / "README.md", *sorted((REPO / "docs").glob("*.md"))]
CHINESE = [REPO / "README.zh-CN.md", *sorted((REPO / "docs" / "zh_cn").glob("*.md"))]
PAGES = [*ENGLISH, *CHINESE]
IDS = [str(page.relative_to(REPO)) for page in PAGES]
COMMANDS = [path for path in sorted((REPO / "benchmarks").glob("*.py")) if "argparse" in path.read_text()]
SCHEMA = yaml.safe_load((REPO / "rules/schemas/config.schema.yaml").read_text(encoding="utf-8"))
FOLDERS = ("benchmarks", "docs", "envs", "profiles", "rules", "tests", "workflow_scripts")
# Files that a user or the workflow writes, and files of other packages.
NOT_OURS = re.compile(
    r"results/|lmdeploy/|profiles/slurm/(site|partitions)\.yaml|(my|train|opencompass)_config\.py"
)
NO_KEYS = re.compile(r".*\.(py|json|jsonl|yaml|html|txt)|tokenizer\.model|opencompass\.lagent")
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


@functools.cache
def files() -> list[str]:
    done = subprocess.run(
        ["git", "-C", REPO, "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def blocks(page: Path, language: str = "") -> list[str]:
    """Returns the fenced code of a page."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language or '[a-z]*'}\n(.*?)^ *```", text, re.S | re.M)


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def spans(page: Path) -> list[str]:
    """Returns the code spans of a page's text."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> list[str]:
    """Returns the lines of code blocks, with continued lines joined, and the code spans."""
    code = "\n".join(blocks(page)).replace("\\\n", " ")
    return [*(line.strip().removeprefix("$ ").strip() for line in code.splitlines()), *spans(page)]


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target} in {page.name}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{target} in {page.name}: no such heading"


def test_every_page_is_linked_and_has_its_twin():
    for readme, folder in (("README.md", "docs"), ("README.zh-CN.md", "docs/zh_cn")):
        text = (REPO / readme).read_text(encoding="utf-8")
        for page in sorted((REPO / folder).glob("*.md")):
            assert f"({folder}/{page.name})" in text, f"{readme} does not lead to {page.name}"
    assert {page.name for page in ENGLISH[2:]} == {page.name for page in CHINESE[1:]}


@each_page
def test_files_that_are_named_exist(page):
    words = {word.strip("(),;:'\"") for command in commands(page) for word in command.split()}
    for word in (re.sub(r":\d+$", "", word) for word in words if not NOT_OURS.match(word)):
        if re.search(r"[<{*\[]|\.\.\.", word):
            pattern = re.sub(r"<[^>]*>|\{[^}]*\}|\.\.\.", "*", word)
        else:
            pattern = word.removesuffix("/")
        if word.split("/")[0] in FOLDERS and "/" in word:
            known = any(fnmatch(file, pattern) or file.startswith(f"{pattern}/") for file in files())
            assert known, f"{page.name} names {word}"
        elif re.fullmatch(r"[\w/]+\.(py|smk)", word):
            assert any(f"/{file}".endswith(f"/{word}") for file in files()), f"{page.name} names {word}"


@functools.cache
def flags_of(script: Path) -> set[str]:
    done = PARENT.run([script, "--help"], timeout=300)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout))


@pytest.mark.parametrize("script", COMMANDS, ids=lambda script: script.name)
def test_each_benchmark_starts(script):
    assert "--help" in flags_of(script)


@each_page
def test_flags_of_commands_exist(page):
    for command in commands(page):
        found = re.search(r"(workflow_scripts|benchmarks)/\w+\.py.*", command)
        if found is None:
            continue
        words = [word.partition("=")[0] for word in shlex.split(found[0], comments=True)]
        asked = {word for word in words if word.startswith("--")}
        # launch_dlc.py passes unknown flags to the script that it starts.
        scripts = [REPO / found[1] / Path(word).name for word in words if word.endswith(".py")]
        known = set().union(*(flags_of(script) for script in scripts if script.is_file())) if asked else set()
        assert asked <= known, f"{page.name}: no {', '.join(sorted(asked - known))} in: {command}"


def key_of(dotted: str) -> dict | None:
    """Returns the schema of a key, or None if it does not exist."""
    schema = SCHEMA
    for part in dotted.split("."):
        if part in schema.get("properties", {}):
            schema = schema["properties"][part]
        elif isinstance(schema.get("additionalProperties"), dict):
            schema = schema["additionalProperties"]
        else:
            return None
    return schema


@each_page
def test_config_keys_exist_and_take_the_values_that_are_named(page):
    sections = [name for name, value in SCHEMA["properties"].items() if "properties" in value]
    for span in spans(page):
        found = re.fullmatch(r"(\w+(?:\.(?:\w+|<\w+>))+)(?:: (.+))?", span)
        if found is None or found[1].split(".")[0] not in sections or NO_KEYS.fullmatch(found[1]):
            continue
        schema = key_of(found[1])
        assert schema is not None, f"{page.name}: there is no setting {found[1]}"
        if found[2] and not re.fullmatch(r"[a-z]", found[2]):  # `train.eval_steps: n`
            value = yaml.safe_load(found[2])
            assert jsonschema.Draft202012Validator(schema).is_valid(value), f"{page.name}: {span}"


def without_required(schema: object) -> object:
    """Returns a schema that accepts a part of a config."""
    if isinstance(schema, dict):
        return {key: without_required(value) for key, value in schema.items() if key != "required"}
    return copy.deepcopy(schema)


@each_page
def test_configs_that_are_shown_are_valid(page):
    partial = jsonschema.Draft202012Validator(without_required(SCHEMA))
    for block in blocks(page, "yaml"):
        config = yaml.safe_load(block)
        if config and config.keys() <= SCHEMA["properties"].keys():
            runs = [each for each in (config.get("runs") or {}).values() if isinstance(each, dict)]
            for shown in (config, *runs):
                own = {key: value for key, value in shown.items() if key in SCHEMA["properties"]}
                errors = [error.message for error in partial.iter_errors(own)]
                assert not errors, f"{page.name}: {errors[0]} in\n{block}"


@each_page
def test_targets_exist(page):
    phony = re.search(r"^\.PHONY: (.*)", (REPO / "Makefile").read_text(), re.M)[1].split()
    rules = re.findall(r"^(?:rule|checkpoint) (\w+):", (REPO / "Snakefile").read_text(), re.M)
    rules += re.findall(r"^rule (\w+):", (REPO / "rules/preflight.smk").read_text(), re.M)
    for command in commands(page):
        if found := re.match(r"make ([a-z-]+)", command):
            assert found[1] in phony, f"{page.name}: {command}"
        if found := re.match(r"snakemake (?:--profile \S+ )?([a-z_]+)(?![\w/])", command):
            assert found[1] in rules, f"{page.name}: {command}"


@each_page
def test_rules_in_tables_exist(page):
    pattern = r"^(?:rule|checkpoint|use rule \w+ as) (\w+)(?: with)?:"
    known = {
        name
        for path in (REPO / "rules").glob("*.smk")
        for name in re.findall(pattern, path.read_text(), re.M)
    }
    targets = set(re.findall(pattern, (REPO / "Snakefile").read_text(), re.M))
    tables = re.findall(r"((?:^\|.*\n)+)", prose(page), re.M)
    named = set()
    for table in tables:
        head, _, *rows = table.splitlines()
        titles = [cell.strip() for cell in head.strip("|").split("|")]
        for column, title in enumerate(titles):
            if title in ("Rule", "规则"):
                for row in rows:
                    cell = row.strip("|").split("|")[column]
                    named |= {name for name in re.findall(r"`([^`]+)`", cell) if re.fullmatch(r"\w+", name)}
    assert named <= known | targets, f"{page.name}: no rules {named - known - targets}"
    if page.name == "workflow.md":
        assert known <= named, f"{page.name} does not describe {known - named}"


@pytest.mark.parametrize("page", ENGLISH[2:], ids=lambda page: page.name)
def test_both_languages_name_the_same_settings_and_scripts(page):
    def named(path: Path) -> set[str]:
        return {span for span in spans(path) if key_of(span.split(":")[0]) or span.endswith((".py", ".smk"))}

    assert named(page) == named(page.parent / "zh_cn" / page.name)


def test_the_template_that_reads_openais_tools_is_the_one_that_the_pages_name():
    reading = [name for name in shipped_templates() if reads_openai_tools(load_template(name))]
    assert reading == ["internlm2_chat"]
    for name, said in (
        ("docs/templates.md", "the shipped ones, `internlm2_chat` alone"),
        (
            "docs/serving.md",
            "With the template `internlm2_chat`, the Jinja in `tokenizer_config.json` takes OpenAI's `tools`",
        ),
        ("docs/zh_cn/templates.md", "自带模板中只有 `internlm2_chat`"),
        (
            "docs/zh_cn/serving.md",
            "使用模板 `internlm2_chat` 时，`tokenizer_config.json` 中的 Jinja 接受 OpenAI 的 `tools`",
        ),
    ):
        assert said in (REPO / name).read_text(encoding="utf-8"), f"{name} says otherwise"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_a_newcomer_is_told_ten_keys(readme):
    rows = re.findall(r"^ +\| `([\w.]+)` \|", prose(REPO / readme), re.M)
    assert len(rows) == 10 and all(key_of(row) for row in rows)
    assert rows[:2] == ["model.path", "data.processed_dir"]


@pytest.mark.parametrize(
    ("readme", "page"), [("README.md", "docs/models.md"), ("README.zh-CN.md", "docs/zh_cn/models.md")]
)
def test_the_readme_counts_the_families_of_the_table(readme, page):
    table = (REPO / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| [\w-]+ \| (`single`|yes, |refused: |是，|拒绝：)", table, re.M)
    packed = sum(row in ("yes, ", "是，") for row in rows)
    counts = [len(rows), packed, rows.count("`single`"), len(rows) - packed - rows.count("`single`")]
    text = (REPO / readme).read_text(encoding="utf-8")
    told = re.search(
        r"(\d+)( families| 个因果).*?(\d+)( train in| 个可打包).*?(\d+)( with one| 个须逐).*?(\d+)( are| 个被)",
        text,
        re.S,
    )
    assert [int(told[number]) for number in (1, 3, 5, 7)] == counts
