"""Kills the jobs of a split file, and the job that joins them, at any file operation, then runs them again.

`python test_tokenize_kills.py` forks all jobs from one process, so that imports happen only once.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ftdp_small_tokenizers import small_tokenizer
from test_tokenize_parts import SMALL, parts_of
from test_tokenize_runs import files_below, random_lines, write_dataset

from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.tokenizing import merge_parts, tokenize_datasets, tokenize_part

pytestmark = pytest.mark.slow

OPTIONS = TokenizeOptions(on_bad_sample="quarantine", max_bad_share=1)
# A part has about 45 file operations, the merge about 100.
PARTS_KILLS, MERGES = 12, 6
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


@pytest.fixture
def processed(tmp_path):
    lines = list(random_lines(1500, 1))
    lines[700] = "not JSON\n"  # one range has a quarantine
    write_dataset(tmp_path / "in", "large", lines)
    write_dataset(tmp_path / "in", "small", random_lines(20))
    return tmp_path / "in"


def test_killed_parts_and_merges(tmp_path, processed):
    tokenize_datasets(processed, tmp_path / "one", small_tokenizer("byte_level"), OPTIONS)
    command = [sys.executable, __file__, processed, tmp_path]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    said = json.loads(done.stdout)
    assert sum(attempt["killed"] for attempt in said) > len(said) / 2
    assert max(attempt["kept"] for attempt in said) > 2
    for attempt in said:
        assert not attempt["again"], f"done again although finished: {said}"
    expected = files_below(tmp_path / "one")
    for number in range(MERGES):
        out = tmp_path / f"merged{number}"
        assert files_below(out) == expected
        # The records hold nothing left over, either.
        assert names(out) == names(tmp_path / "one")


def environment():
    paths = [*sys.path, str(Path(__file__).parent)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TOKENIZERS_PARALLELISM": "false",
    }


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def records(out: Path) -> dict[str, tuple]:
    """Returns the records of finished chunks, each with the inode and mtime of its `.bin` file."""
    found = {}
    for path in (out / "chunks").rglob("*.json"):
        if path.name == "done.json":
            bin_file = out / "chatml_llamav13_32k/train/cn" / path.parts[-3] / f"{path.parts[-2]}.bin"
        else:
            bin_file = path.with_suffix(".train.bin")
        if not path.name.startswith("."):
            found[str(path)] = (bin_file.stat().st_ino, bin_file.stat().st_mtime_ns)
    return found


def attempt(work, kill_at: int) -> bool:
    """Runs `work` in a process that is killed at file operation number `kill_at`. True if it was killed."""
    if not (child := os.fork()):
        count = 0

        def count_down(event, _):
            nonlocal count
            if event in EVENTS:
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count_down)
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or not status, f"the job failed: {status}"
    return os.WIFSIGNALED(status)


def main(processed: Path, folder: Path) -> None:
    tokenizer = small_tokenizer("byte_level")
    rng = random.Random(0)
    said = []

    def killed(out: Path, work, operations: int) -> None:
        before = records(out)
        was_killed, after = attempt(work, rng.randint(1, operations)), records(out)
        # A range's record may be removed only once the record of the whole file exists.
        again = [
            name
            for name, stamp in before.items()
            if after.get(name) != stamp and str(Path(name).with_name("done.json")) not in after
        ]
        said.append({"killed": was_killed, "kept": len(before), "again": again})

    def parts() -> None:
        for name in parts_of(processed):
            tokenize_part(processed, folder / "parts", tokenizer, OPTIONS, name, **SMALL)

    for _ in range(PARTS_KILLS):
        killed(folder / "parts", parts, 70)
    attempt(parts, 0)
    for number in range(MERGES):
        out = shutil.copytree(folder / "parts", folder / f"merged{number}")
        merge = functools.partial(merge_parts, processed, out, tokenizer, OPTIONS)
        killed(out, merge, 90)
        attempt(merge, 0)
    print(json.dumps(said), file=sys.__stdout__)


if __name__ == "__main__":
    sys.stdout = sys.stderr  # keeps the jobs' output out of stdout
    main(Path(sys.argv[1]), Path(sys.argv[2]))
