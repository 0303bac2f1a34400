"""The library's rooms: each imports only from rooms below it, and none is too large."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
LIBRARY = SCRIPTS / "snaketune"
LARGEST_SHARE = 0.15


def rooms() -> list[str]:
    """Returns the rooms from the lowest to the highest, as docs/code.md lists them."""
    page = (SCRIPTS.parent / "docs" / "code.md").read_text(encoding="utf-8")
    table = page[page.index("| Room |") :].partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)` ", table, re.MULTILINE)


def imports_of(path: Path) -> set[str]:
    """Returns the modules of the library that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("snaketune.")}


MODULES = sorted(path for path in LIBRARY.rglob("*.py") if path.name != "__init__.py")


def test_each_room_is_in_the_plan_of_the_house():
    assert sorted(rooms()) == sorted(path.parent.name for path in LIBRARY.glob("*/__init__.py"))


def test_no_import_runs_up():
    height = {room: number for number, room in enumerate(rooms())}
    runs_up = [
        f"{path.relative_to(LIBRARY)} imports {name}"
        for path in MODULES
        for name in sorted(imports_of(path))
        if height[name.split(".")[1]] > height[path.parent.name]
    ]
    assert runs_up == []


def test_no_circle_of_modules():
    names = {".".join(path.relative_to(SCRIPTS).with_suffix("").parts): path for path in MODULES}
    graph = {
        name: {
            module
            for each in imports_of(path)
            for module in (each, each.rpartition(".")[0])
            if module in names
        }
        for name, path in names.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_no_room_is_too_large():
    lines = dict.fromkeys(rooms(), 0)
    for path in MODULES:
        lines[path.parent.name] += len(path.read_text(encoding="utf-8").splitlines())
    largest = max(lines, key=lines.get)
    assert lines[largest] <= LARGEST_SHARE * sum(lines.values()), f"{largest}: {lines}"


def test_snakemake_finds_only_the_library_and_what_training_configs_import():
    assert sorted(path.parent.name for path in SCRIPTS.glob("*/__init__.py")) == ["sft", "snaketune"]
