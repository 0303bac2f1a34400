"""The files of a run: Snakemake's patterns and the library share one table of names."""

from __future__ import annotations

import os
import re

import pytest

from snaketune.common import result_paths as names
from snaketune.common.cli import UserError
from snaketune.common.files import write_json
from snaketune.common.run_files import RunFiles, newest_run_folder, read_records


def test_the_grammar_on_top_of_the_rules_explains_every_path(repo_root):
    text = (repo_root / "rules/common.smk").read_text(encoding="utf-8")
    grammar = text.split('"""')[1]
    used = re.findall(r"\{(RUN|RESULTS)\}/\{result_paths\.(\w+)\}", text)
    assert len(used) > 30
    for below, name in used:
        path = getattr(names, name)
        assert (f"{{run}}/{path}" if below == "RUN" else path) in grammar, name


def test_files_are_found_in_the_folder_and_read_once(tmp_path):
    run = RunFiles(tmp_path)
    assert run.name == tmp_path.name
    assert run.path(names.EVALUATION, label="base") == tmp_path / "evaluation/base.json"
    assert run.find(names.PARITY) is None and run.hf is None
    with pytest.raises(UserError, match=r"train\.json is missing"):
        run.train  # noqa: B018 - the access reads the file
    write_json(
        tmp_path / "train.json", {"run_folder": "checkpoints/x", "checkpoint": "checkpoints/x/iter_2.pth"}
    )
    assert run.run_folder == tmp_path / "checkpoints/x"
    assert run.checkpoint == run.run_folder / "iter_2.pth"
    (tmp_path / "train.json").unlink()
    assert run.train["run_folder"] == "checkpoints/x"
    assert run.attempts == {"attempts": 1} and run.evals == []


def test_a_run_whose_paths_are_given_has_no_other_files(tmp_path):
    for name in ("parity.json", "hf/manifest.json", "elsewhere.json"):
        write_json(tmp_path / name, {"name": name})
    given = {names.PARITY: tmp_path / "elsewhere.json", names.OPENCOMPASS: None}
    run = RunFiles(tmp_path, "demo", given)
    assert run.read(names.PARITY) == {"name": "elsewhere.json"}
    assert run.hf is None and run.find(names.OPENCOMPASS) is None
    with pytest.raises(UserError, match="config.json of run demo was not given"):
        run.config  # noqa: B018
    (tmp_path / "elsewhere.json").unlink()
    with pytest.raises(UserError, match=r"elsewhere\.json is missing"):
        RunFiles(tmp_path, "demo", given).find(names.PARITY)


def test_a_torn_last_line_is_skipped(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_records(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2"):
        read_records(path)


def test_the_newest_run_folder(tmp_path):
    assert newest_run_folder(tmp_path) is None
    for age, name in ((20, "a"), (10, "b"), (30, "c")):
        file = tmp_path / "checkpoints" / name / "identity.json"
        write_json(file, {})
        os.utime(file, (1000 - age, 1000 - age))
    assert newest_run_folder(tmp_path) == tmp_path / "checkpoints/b"
    assert newest_run_folder(tmp_path / "checkpoints/c") == tmp_path / "checkpoints/c"
