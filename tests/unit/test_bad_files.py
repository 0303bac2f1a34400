"""Difficult files: changed, removed, unreadable, linked or oddly named, and full disks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from ftdp_files import GOOD, finals, source_of, tokenize
from ftdp_small_tokenizers import extended_folder

from snaketune.chat_files.line_reader import LineReader
from snaketune.common.cli import UserError
from snaketune.common.files import write_bytes
from snaketune.tokenized import tokenizing


def test_a_file_that_is_removed_while_it_is_read(tmp_path):
    (tmp_path / "f").write_bytes(GOOD * 1000)
    with (
        pytest.raises(UserError, match="was changed while it was read"),
        LineReader(tmp_path / "f", 100) as reader,
    ):
        for _ in reader:
            (tmp_path / "f").unlink(missing_ok=True)


def test_a_file_that_is_removed_while_it_is_tokenised(tmp_path, monkeypatch):
    source = source_of(tmp_path)
    source.write_bytes((GOOD + b"\n") * 10_000)
    blocks_of = tokenizing._blocks

    def blocks(*arguments):
        for block in blocks_of(*arguments):
            yield block
            source.unlink(missing_ok=True)

    monkeypatch.setattr(tokenizing, "_blocks", blocks)
    with pytest.raises(UserError, match=r"f\.jsonl was changed while it was read") as caught:
        tokenize(tmp_path)
    assert "it was removed" in str(caught.value)
    assert finals(tmp_path) == []


@pytest.mark.parametrize("change", ["append", "replace", "shorten"])
def test_a_file_that_changes_while_it_is_read(tmp_path, change):
    path = tmp_path / "f"
    path.write_bytes((GOOD + b"\n") * 1000)
    with pytest.raises(UserError, match="was changed while it was read"), LineReader(path, 100) as reader:
        for number, _ in enumerate(reader):
            if number:
                continue
            if change == "append":
                with open(path, "ab") as file:
                    file.write(GOOD)
            elif change == "replace":
                write_bytes(path, (GOOD + b"\n") * 1000)
            else:
                os.truncate(path, 10_000)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        LineReader(tmp_path / "f")


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="no /proc: no file whose reading fails for root"
)
def test_a_file_that_cannot_be_read():
    # The file opens, but the first read fails.
    with (
        pytest.raises(UserError, match="/proc/self/mem cannot be read"),
        LineReader("/proc/self/mem") as reader,
    ):
        list(reader)


def test_a_file_without_permission(tmp_path):
    source_of(tmp_path).write_bytes(GOOD)
    (tmp_path / "out").mkdir()
    source_of(tmp_path).chmod(0)
    with pytest.raises(UserError, match="cannot be read") as caught, as_an_ordinary_user(tmp_path):
        tokenize(tmp_path)
    assert "Permission denied" in str(caught.value) and str(source_of(tmp_path)) in str(caught.value)
    source_of(tmp_path).chmod(0o644)
    source_of(tmp_path).parent.chmod(0)
    with pytest.raises(UserError, match="sft cannot be read"), as_an_ordinary_user(tmp_path):
        tokenize(tmp_path)


@contextmanager
def as_an_ordinary_user(folder):
    """Runs the block as the user nobody if the tests run as root, because root may read everything."""
    if os.geteuid():
        yield
        return
    # Other users cannot enter pytest's folders.
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    (folder / "out").chmod(0o777)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_links(tmp_path):
    real = source_of(tmp_path, "real.jsonl")
    real.write_bytes(GOOD)
    folder = real.parent
    (folder / "up").symlink_to(tmp_path / "in", target_is_directory=True)
    (folder / "self").symlink_to(folder / "self")
    (folder / "also.jsonl").symlink_to(real)
    assert tokenize(tmp_path)["totals"]["samples"] == 2
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    with pytest.raises(UserError, match=r"loop\.jsonl cannot be read"):
        tokenize(tmp_path)


def test_two_files_of_one_name(tmp_path):
    source_of(tmp_path, "f.jsonl").write_bytes(GOOD)
    other = tmp_path / "in" / "d" / "processed" / "other" / "f.jsonl"
    other.parent.mkdir()
    other.write_bytes(GOOD)
    with pytest.raises(UserError, match="two files have the same name") as caught:
        tokenize(tmp_path)
    assert str(other) in str(caught.value) and str(source_of(tmp_path)) in str(caught.value)


ODD = "a b; 'c' \"d\" $(e) ü 数据 #%&*[x]{y}\n.v2"


@pytest.mark.slow
def test_odd_names(tmp_path, run_script):
    source = tmp_path / "in" / ODD / "processed" / ODD / f"{ODD}.jsonl"
    source.parent.mkdir(parents=True)
    source.write_bytes(GOOD + b"\noops\n")
    run_script(
        *("tokenize_dataset.py", "--processed-dir", tmp_path / "in", "--tokenized-dir", tmp_path / "out"),
        *("--tokenizer-path", extended_folder(), "--dataset", ODD),
        *("--on-bad-sample", "quarantine", "--max-bad-share", "0.5"),
    )
    manifest = json.loads((tmp_path / "out" / "manifests" / f"{ODD}.json").read_text())
    assert manifest["totals"]["samples"] == manifest["totals"]["quarantined"] == 1
    assert (tmp_path / "out" / manifest["files"][0]["bin"]).name == f"{ODD}.bin"
    assert (tmp_path / "out" / "manifests" / ODD / f"{ODD}.quarantine.jsonl").exists()


# No space left.

needs_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@pytest.fixture
def on_a_small_disk(tmp_path):
    """Returns a function that runs a script with `tmp_path / "out"` as a disk of 256 KiB, then lists its files."""
    (tmp_path / "out").mkdir()
    mount = 'mount -t tmpfs -o size=256k none "$0" || exit 77'
    # An ordinary user may also mount a disk that only his own processes see.
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]

    def run(*command):
        script = f'{mount}; "$@"; code=$?; find "$0" -type f; exit $code'
        arguments = [*unshare, script, tmp_path / "out", sys.executable, *command]
        done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
        if done.returncode == 77 or "unshare failed" in done.stderr:
            pytest.skip("this system lets nobody mount a small disk")
        return done

    return run


SCRIPTS = {
    "tokens": ("tokenize_dataset.py", GOOD),
    "bad lines": ("tokenize_dataset.py", b"oops"),
    "a dataset": ("ingest_dataset.py", GOOD),
}


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare")
@pytest.mark.parametrize("case", SCRIPTS)
def test_a_disk_that_fills_up(tmp_path, repo_root, on_a_small_disk, case):
    name, line = SCRIPTS[case]
    source = source_of(tmp_path)
    source.write_bytes((line + b"\n") * 20_000)
    if name == "ingest_dataset.py":
        arguments = ["--input", source, "--processed-dir", tmp_path / "out", "--dataset", "d"]
    else:
        arguments = ["--processed-dir", tmp_path / "in", "--tokenized-dir", tmp_path / "out"]
        arguments += ["--tokenizer-path", extended_folder(), "--on-bad-sample", "quarantine"]
    done = on_a_small_disk(repo_root / "workflow_scripts" / name, *arguments)
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr and "cannot write" in done.stderr
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
    # No file is left, not even a partial one.
    assert done.stdout == ""


@needs_full_disk
def test_a_run_after_the_disk_was_full(tmp_path):
    source_of(tmp_path).write_bytes((GOOD + b"\n") * 5000)
    train = tmp_path / "out" / "chatml_llamav13_32k" / "train" / "cn" / "d"
    train.mkdir(parents=True)
    # The temporary file is a link to a device that is always full.
    (train / f".f.bin.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        tokenize(tmp_path)
    assert finals(tmp_path) == []
    assert tokenize(tmp_path)["totals"]["samples"] == 5000


@needs_full_disk
def test_a_script_on_a_full_disk_ends_with_one_line(repo_root):
    code = "from snaketune.common.cli import run\nrun(lambda: open('/dev/full', 'w').write('x' * 100_000))"
    environment = os.environ | {"PYTHONPATH": str(repo_root / "workflow_scripts")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No space left on device") and "Traceback" not in done.stderr
