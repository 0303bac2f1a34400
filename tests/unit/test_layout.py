"""Which files make up a dataset."""

from __future__ import annotations

import subprocess
import sys

import pytest

from snaketune.chat_files.processed_layout import find_datasets
from snaketune.common.cli import UserError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]\n")


def found(root):
    return {
        name: [path.relative_to(root).as_posix() for path in files]
        for name, files in find_datasets(root).items()
    }


def test_finds_what_xtuner_takes(tmp_path):
    touch(
        tmp_path,
        "b/processed/sft_chat/b2.jsonl",
        "b/processed/sft_chat/b1.jsonl",
        "b/processed/b3.jsonl",
        "b/origin/raw.jsonl",
        "b/processed/notes.txt",
        "b/processed/.hidden.jsonl",
        "b/processed/.cache/x.jsonl",
        "a b'\";é/processed/x y.jsonl",
        "c/v2/processed/deep/er/c.jsonl",
        "no_data/readme.md",
        "stray.jsonl",
    )
    assert found(tmp_path) == {
        "a b'\";é": ["a b'\";é/processed/x y.jsonl"],
        "b": ["b/processed/b3.jsonl", "b/processed/sft_chat/b1.jsonl", "b/processed/sft_chat/b2.jsonl"],
        "c": ["c/v2/processed/deep/er/c.jsonl"],
    }
    assert list(find_datasets(tmp_path)) == sorted(find_datasets(tmp_path))


def test_links(tmp_path):
    touch(tmp_path, "elsewhere/x.jsonl", "in/a/processed/y.jsonl")
    root = tmp_path / "in"
    (root / "a" / "processed" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "processed" / "back").symlink_to(root)
    (root / "linked").symlink_to(root / "a")
    assert found(root) == {
        "a": ["a/processed/more/x.jsonl", "a/processed/y.jsonl"],
        "linked": ["linked/processed/more/x.jsonl", "linked/processed/y.jsonl"],
    }
    (root / "a" / "processed" / "gone.jsonl").symlink_to(root / "nothing")
    with pytest.raises(UserError, match="broken link"):
        find_datasets(root)


def test_two_files_of_one_name(tmp_path):
    touch(tmp_path, "d/processed/x/f.jsonl", "d/processed/y/f.jsonl")
    with pytest.raises(UserError, match=r"x/f\.jsonl and .*y/f\.jsonl"):
        find_datasets(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        find_datasets(tmp_path / "no")
    touch(tmp_path, "processed/sft_chat/x.jsonl")
    # XTuner names this dataset "processed". So do we: it does match the layout.
    assert list(find_datasets(tmp_path)) == ["processed"]
    with pytest.raises(UserError, match="has no dataset"):
        find_datasets(tmp_path / "processed" / "sft_chat")


def test_imports_nothing_heavy(repo_root):
    code = "import sys; import snaketune.chat_files.processed_layout; print(sorted({'numpy', 'tokenizers', 'torch', 'orjson'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repo_root / "workflow_scripts",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
