"""Runs the whole workflow once on a small copy of the demo; the tests then check what a change reruns.

Every run that a test kills, stops or measures uses the plain commands, with one process per job. In all others, Snakemake
and the jobs' scripts are warm (tests/warm.py).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from warm import PARENT, SNAKEMAKE

_WARM_PYTHON = """#!/bin/sh
case "$1" in
    {plain}) ;;
    *.py) exec {client} "$@" ;;
esac
exec {python} "$@"
"""


@dataclass
class Project:
    """A working folder with its own config, data and copy of the code, driven by the real `snakemake` command.

    `python` is `python` in the rules' commands.
    """

    code: Path
    folder: Path
    python: Path

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def config(self) -> dict:
        return yaml.safe_load(self.config_file.read_text(encoding="utf-8"))

    def configure(self, **sections) -> None:
        """Merges keys into sections of the config file, two levels deep."""
        config = self.config
        for name, values in sections.items():
            config[name] = {**config.get(name, {}), **values}
        self.config_file.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")

    def command(self, *args: object) -> list[str]:
        """Returns the command as a user types it."""
        return [
            *(sys.executable, "-m", "snakemake", "--snakefile", str(self.code / "Snakefile")),
            *("--configfile", str(self.config_file), "--directory", str(self.folder), "--cores", "2"),
            *map(str, args),
        ]

    def run(self, *args: object, check: bool = True) -> subprocess.CompletedProcess:
        """Runs the command to its end, warm."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        options = {"cwd": self.code, "timeout": 1200, "env": {**os.environ, "PATH": path}}
        assert PARENT.address.exists()  # waits while it is still importing
        done = SNAKEMAKE.run(self.command(*args)[1:], executable=self.python, **options)
        if check and done.returncode != 0:
            raise AssertionError(f"snakemake failed\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        return done

    def stand_still(self) -> None:
        """Prepares a training with the hook `StandStill`; tests/train_hooks.py must be on PYTHONPATH."""
        self.run("results/demo/train_config.py")
        text = (self.folder / "results" / "demo" / "train_config.py").read_text(encoding="utf-8")
        text = text.replace("from torch.optim", "from train_hooks import StandStill\nfrom torch.optim")
        text = text.replace("custom_hooks = []", "custom_hooks = [dict(type=StandStill)]")
        assert text.count("StandStill") == 2
        own = self.folder / "own_config.py"
        own.write_text(text, encoding="utf-8")
        self.configure(train={"config": str(own)})
        self.run("plan", "results/demo/train_config.py")

    def planned(self, *args: object) -> dict[str, int]:
        """Returns the number of jobs by rule in a dry run, without the target rules."""
        done = self.run("--quiet", "rules", "--dry-run", *args)
        text = done.stdout + done.stderr
        table = re.search(r"^job\s+count\n-+\s+-+\n(.*?)^total\s+\d+", text, re.M | re.S)
        if table is None:
            assert "Nothing to be done" in text, text
            return {}
        jobs = dict(re.findall(r"^(\w+)\s+(\d+)", table[1], re.M))
        targets = {"all", "tokenize", "plan", "train", "hf", "turbomind", "parity", "evaluate", "report"}
        return {name: int(count) for name, count in jobs.items() if name not in targets}


def write_python(folder: Path, plain: str = "-") -> Path:
    """Writes a `python` that runs scripts warm, except those that the shell pattern `plain` fits, and all else as usual."""
    python = folder / "python"
    words = {"python": shlex.quote(sys.executable), "client": PARENT.client_command(), "plain": plain}
    python.write_text(_WARM_PYTHON.format(**words))
    python.chmod(0o755)
    return python


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory) -> Path:
    """A `python` whose scripts are warm."""
    return write_python(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="session")
def make_project(repo_root, tmp_path_factory, warm_python):
    """Returns a function that creates a small copy of the demo in a new folder."""
    model = repo_root / "resources" / "tiny-mistral"
    if not (model / "config.json").is_file():
        pytest.skip("resources/tiny-mistral is missing: run `make setup`")

    def make(name: str = "project") -> Project:
        folder = tmp_path_factory.mktemp(name)
        for part in ("rules", "workflow_scripts", "profiles", "envs"):
            shutil.copytree(
                repo_root / part, folder / "code" / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(repo_root / "Snakefile", folder / "code")
        config = yaml.safe_load((repo_root / "config.yaml").read_text(encoding="utf-8"))
        shutil.copytree(repo_root / "docs" / "examples" / "processed", folder / "processed")
        config["environments"] = {"turbomind_python": str(repo_root / ".venv-turbomind" / "bin" / "python")}
        config["model"] = {"path": str(model)}
        config["data"]["processed_dir"] = "processed"
        config["evaluate"] = {
            "prompts": str(repo_root / "docs" / "examples" / "prompts.json"),
            "max_new_tokens": 4,
            "max_samples": 4,
        }
        config["tool_calls"] = {
            "max_points": 6,
            "max_new_tokens": 4,
            "max_samples": 4,
            "plain_text": str(repo_root / "docs" / "examples" / "plain_text.txt"),
        }
        config["train"] |= {"max_length": 128, "max_steps": 6, "save_steps": 2}
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return Project(folder / "code", folder, warm_python)

    return make


@pytest.fixture(scope="session")
def finished(make_project, tmp_path_factory) -> Project:
    """A project whose main job has finished. Tests that change it restore it. Its training's memory is measured."""
    project = make_project("finished")
    replace(project, python=write_python(tmp_path_factory.mktemp("bin"), plain="*/train_model.py")).run()
    return project


@pytest.fixture(scope="session")
def tokenised(finished, tmp_path_factory):
    """Returns a function that makes a project from the finished one's tokenised data and given run files."""

    def make(name: str, *files: str) -> Project:
        folder = tmp_path_factory.mktemp(name) / "project"
        left_out = shutil.ignore_patterns("demo", "locks", "logs", "benchmarks")
        shutil.copytree(finished.folder, folder, ignore=left_out)
        for file in files:
            copy = folder / "results" / "demo" / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(finished.folder / "results" / "demo" / file, copy)
        return replace(finished, code=folder / "code", folder=folder)

    return make
