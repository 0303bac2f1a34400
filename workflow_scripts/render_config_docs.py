"""Writes docs/config.md and docs/zh_cn/config.md from the configuration's schema."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from snaketune.common.files import write_text
from snaketune.settings.schema import load_schema

REPO = Path(__file__).resolve().parent.parent
LANGUAGES = {
    "en": {
        "file": REPO / "docs" / "config.md",
        "title": "# Configuration",
        "other": "[简体中文](zh_cn/config.md)",
        "intro": (
            "Generated from `rules/schemas/config.schema.yaml` by `make docs`. Unknown keys and wrong types are errors, "
            "reported before any job starts. A run's own value overrides the shared one, which overrides the default. "
            "The scripts' flags and the rules' commands are generated from the same file."
        ),
        "columns": ("Key", "Type", "Default", "Meaning"),
        "required": "required",
        "describe": "description",
    },
    "zh": {
        "file": REPO / "docs" / "zh_cn" / "config.md",
        "title": "# 配置",
        "other": "[English](../config.md)",
        "intro": (
            "由 `make docs` 根据 `rules/schemas/config.schema.yaml` 生成。未知的键与错误的类型会在任何任务启动之前报错。"
            "run 自己的值优先于共享值，共享值优先于默认值。脚本的参数与规则的命令由同一文件生成。"
        ),
        "columns": ("键", "类型", "默认值", "含义"),
        "required": "必填",
        "describe": "x-zh",
    },
}


def render(schema: dict, words: dict) -> str:
    """Returns the Markdown page in one language."""
    lines = [words["title"], "", words["other"], "", words["intro"], ""]
    top = {key: value for key, value in schema["properties"].items() if "properties" not in value}
    sections = {key: value for key, value in schema["properties"].items() if "properties" in value}
    lines += table(top, "", schema.get("required", []), words)
    for name, section in sections.items():
        lines += [f"## {name}", "", section[words["describe"]], ""]
        lines += table(section["properties"], f"{name}.", section.get("required", []), words)
    return "\n".join(lines).rstrip() + "\n"


def table(keys: dict, prefix: str, required: list[str], words: dict) -> list[str]:
    """Returns a Markdown table with one row per key."""
    rows = ["| " + " | ".join(words["columns"]) + " |", "| --- | --- | --- | --- |"]
    for key, value in keys.items():
        if "default" in value:
            default = f"`{json.dumps(value['default'])}`"
        else:
            default = words["required"] if key in required else ""
        meaning = value[words["describe"]].replace("|", "\\|")
        rows.append(f"| `{prefix}{key}` | {type_of(value)} | {default} | {meaning} |")
        if "properties" in value:
            inner = table(value["properties"], f"{prefix}{key}.", value.get("required", []), words)
            rows += inner[2:-1]
    return [*rows, ""]


def type_of(value: dict) -> str:
    """Returns a key's type and bounds, in a form that needs no translation."""
    if "enum" in value:
        return ", ".join(f"`{item}`" for item in value["enum"])
    kind = value["type"]
    text = " \\| ".join(kind) if isinstance(kind, list) else kind
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {value[name]}" for name, sign in signs.items() if name in value]
    return f"{text}, {', '.join(bounds)}" if bounds else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with code 1 if a page is outdated"
    )
    args = parser.parse_args()
    schema = load_schema()
    stale = []
    for words in LANGUAGES.values():
        text, file = render(schema, words), words["file"]
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(str(file.relative_to(REPO)))
            if not args.check:
                write_text(file, text)
    if stale:
        print(("outdated, run `make docs`: " if args.check else "wrote ") + ", ".join(stale))
    return int(bool(stale) and args.check)


if __name__ == "__main__":
    sys.exit(main())
