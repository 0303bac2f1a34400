"""Every script has help, and reports missing arguments without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPTS = sorted(path.name for path in (Path(__file__).parents[2] / "workflow_scripts").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_describes_the_script_and_every_flag(name, run_script):
    text = run_script(name, "--help").stdout
    description = text.split("\n\n")[1]
    assert len(description) > 30
    lines = text.splitlines()
    flags = [i for i, line in enumerate(lines) if line.startswith("  --")]
    # A flag's help follows it, on the next line if the flag is long.
    assert flags or "positional arguments:" in lines
    for i in flags:
        assert "  " in lines[i].strip() or lines[i + 1].startswith("          "), lines[i]


@pytest.mark.parametrize(
    "name", [n for n in SCRIPTS if n not in ("render_config_docs.py", "render_models_docs.py")]
)
def test_a_missing_argument_is_told_without_a_traceback(name, run_script):
    done = run_script(name, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "required" in done.stderr
