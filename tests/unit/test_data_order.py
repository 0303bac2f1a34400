"""data_order.txt lists only train files, relative to the train folder, in the same order everywhere."""

from __future__ import annotations

import pytest

from snaketune.common.cli import UserError
from snaketune.tokenized.data_order import list_train_files, read_data_order

NAMES = ["cn/a b/2.bin", "cn/a b/10.bin", "cn/z/sub/1.bin", "cn/z/x.bin", "cn/é'\";/q.bin"]
ORDER = ["cn/a b/10.bin", "cn/a b/2.bin", "cn/z/x.bin", "cn/z/sub/1.bin", "cn/é'\";/q.bin"]


@pytest.fixture
def tokenized(tmp_path):
    root = tmp_path / "tokenized"
    for split in ("train", "valid"):
        for name in NAMES:
            path = root / "chatml_llamav13_32k" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            path.with_name(f"{path.name}.meta").write_bytes(b"")
    (root / "chatml_llamav13_32k" / "train" / "cn" / "z" / ".x.bin.12.tmp").write_bytes(b"")
    return root


@pytest.mark.parametrize("folder", [".", "chatml_llamav13_32k", "chatml_llamav13_32k/train"])
def test_lists_train_files_only(tokenized, tmp_path, folder, run_script):
    save = tmp_path / "new folder"
    run_script("write_data_order.py", "--data-folder", tokenized / folder, "--save-folder", save)
    assert (save / "data_order.txt").read_text(encoding="utf-8").splitlines() == ORDER
    assert read_data_order(save / "data_order.txt") == ORDER
    train = tokenized / "chatml_llamav13_32k" / "train"
    assert all((train / name).is_file() for name in ORDER)


def test_other_file_type(tokenized, tmp_path, run_script):
    arguments = ("--data-folder", tokenized, "--save-folder", tmp_path, "--file-type", ".meta")
    run_script("write_data_order.py", *arguments)
    assert read_data_order(tmp_path / "data_order.txt") == [f"{name}.meta" for name in ORDER]


def test_linked_folders(tokenized):
    train = tokenized / "chatml_llamav13_32k" / "train"
    (train / "cn" / "linked").symlink_to(train / "cn" / "z")
    (train / "cn" / "z" / "loop").symlink_to(train)
    names = list_train_files(train)
    assert "cn/linked/x.bin" in names
    assert all("loop" not in name for name in names)


def test_errors(tokenized, tmp_path, run_script):
    done = run_script(
        "write_data_order.py", "--data-folder", tmp_path / "no", "--save-folder", tmp_path, check=False
    )
    assert done.returncode == 2
    assert "has no train folder" in done.stderr
    assert "Traceback" not in done.stderr
    done = run_script(
        *("write_data_order.py", "--data-folder", tokenized, "--save-folder", tmp_path, "--file-type", ".x"),
        check=False,
    )
    assert "no file ends in '.x'" in done.stderr
    order = tmp_path / "data_order.txt"
    for text, message in (("", "is empty"), ("a.bin\nb.bin\na.bin\n", "twice")):
        order.write_text(text)
        with pytest.raises(UserError, match=message):
            read_data_order(order)
