"""The whole workflow, run once for real on a small copy of the demo; the tests then ask what a change costs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml


@dataclass
class Project:
    """A working folder with its own config, data and copy of the code, driven by the real `snakemake` command."""

    code: Path
    folder: Path

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
        return [
            *(sys.executable, "-m", "snakemake", "--snakefile", str(self.code / "Snakefile")),
            *("--configfile", str(self.config_file), "--directory", str(self.folder), "--cores", "2"),
            *map(str, args),
        ]

    def run(self, *args: object, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(
            self.command(*args), capture_output=True, text=True, cwd=self.code, timeout=1200
        )
        if check and done.returncode != 0:
            raise AssertionError(f"snakemake failed\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        return done

    def planned(self, *args: object) -> dict[str, int]:
        """Returns what `snakemake -n` would run: jobs by rule, without the target rules."""
        done = self.run("--quiet", "rules", "--dry-run", *args)
        text = done.stdout + done.stderr
        table = re.search(r"^job\s+count\n-+\s+-+\n(.*?)^total\s+\d+", text, re.M | re.S)
        if table is None:
            assert "Nothing to be done" in text, text
            return {}
        jobs = dict(re.findall(r"^(\w+)\s+(\d+)", table[1], re.M))
        targets = {"all", "tokenize", "plan", "train", "hf", "turbomind", "parity", "evaluate", "report"}
        return {name: int(count) for name, count in jobs.items() if name not in targets}


@pytest.fixture(scope="session")
def make_project(repo_root, tmp_path_factory):
    """Returns a function that lays out a small copy of the demo in a folder of its own."""
    model = repo_root / "resources" / "tiny-mistral"
    if not (model / "config.json").is_file():
        pytest.skip("resources/tiny-mistral is not there: run `make setup`")

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
        return Project(folder / "code", folder)

    return make


@pytest.fixture(scope="session")
def finished(make_project) -> Project:
    """A project whose main job has run to the end. Tests that change it put it back."""
    project = make_project("finished")
    project.run()
    return project
