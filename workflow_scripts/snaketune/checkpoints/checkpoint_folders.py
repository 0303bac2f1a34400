"""Checkpoints that are either whole or absent.

A checkpoint is a folder `iter_N.pth`, saved after N optimizer steps. It is written under a temporary name and
flushed. It then gets its marker COMPLETE.json, which has the size and SHA-256 of every file, and is renamed.
The file `latest` beside it is updated last. Full checkpoints hold DeepSpeed's files (weights, optimizer,
schedulers) and one random state per rank. Weights-only checkpoints hold `weights.pt` and cannot be resumed.

File sizes reveal a torn checkpoint at no cost (`is_whole`). Finding a flipped bit takes reading every byte
(`is_intact`), which is done before training resumes from a checkpoint and before its weights are exported.
"""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from snaketune.common.files import fsync_path, read_json, sha256_file, write_json, write_text
from snaketune.common.result_paths import MARKER

LATEST = "latest"
UNIVERSAL = ".universal"  # holds a checkpoint while it is loaded with a different number of ranks
_NAME = re.compile(r"iter_(\d+)\.pth")


def step_of(pth: str | os.PathLike) -> int:
    """Returns N of `iter_N.pth`."""
    return int(_NAME.fullmatch(Path(pth).name)[1])


def is_whole(pth: Path) -> bool:
    """True if every file that the marker lists exists with the right size."""
    try:
        files = read_json(pth / MARKER)["files"]
        return all((pth / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_intact(pth: Path, rank: int = 0, world_size: int = 1) -> bool:
    """True if this rank's share of a whole checkpoint's files matches the digests in the marker."""
    files = read_json(pth / MARKER)["files"]
    mine = sorted(files)[rank::world_size]
    found = describe_files([pth / name for name in mine])
    return all(found[name]["sha256"] == files[name]["sha256"] for name in mine)


def set_aside(pth: Path) -> Path:
    """Renames a corrupt checkpoint to `corrupt_iter_N.pth`, so that nothing reads it. Returns that path."""
    target = pth.with_name(f"corrupt_{pth.name}")
    shutil.rmtree(target, ignore_errors=True)
    pth.rename(target)
    fsync_path(pth.parent)
    return target


def describe_files(files: list[Path], flush: bool = False) -> dict[str, dict]:
    """Returns the size and SHA-256 of files by name; with `flush`, also flushes the files to disk.

    All files are processed in parallel.
    Hashing (1.5 GB/s per core) overlaps the flush, so on a slow disk it adds no time to a save.
    """
    with ThreadPoolExecutor() as pool:
        flushed = [pool.submit(fsync_path, file) for file in files if flush]
        digests = list(pool.map(sha256_file, files))
        for each in flushed:
            each.result()
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }


def is_resumable(pth: Path) -> bool:
    """True if a whole checkpoint includes the optimizer state."""
    return read_json(pth / MARKER)["save_optimizer"]


def saved_world_size(pth: Path) -> int:
    """Returns the number of ranks that wrote a whole checkpoint."""
    return read_json(pth / MARKER)["world_size"]


def is_last(pth: Path) -> bool:
    """True if a whole checkpoint was saved after the run's last step."""
    marker = read_json(pth / MARKER)
    return marker["step"] == marker["total_steps"]


def list_checkpoints(run_folder: str | os.PathLike, warn: bool = True) -> list[Path]:
    """Returns the whole checkpoints of a run folder, oldest first. Skips torn ones with a warning."""
    found = [
        path for path in Path(run_folder).glob("iter_*.pth") if path.is_dir() and _NAME.fullmatch(path.name)
    ]
    whole = []
    for path in sorted(found, key=step_of):
        if is_whole(path):
            whole.append(path)
        elif warn:
            print(f"warning: {path} is not a whole checkpoint; skipped", flush=True)
    return whole


def newest_whole_checkpoint(run_folder: str | os.PathLike) -> Path | None:
    """Returns the whole checkpoint with the most steps, or None."""
    return (list_checkpoints(run_folder) or [None])[-1]


def seal(temporary: Path, target: Path, marker: dict) -> None:
    """Turns a folder with all files of a checkpoint into the checkpoint `target`."""
    write_json(temporary / MARKER, marker)
    fsync_path(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    fsync_path(target.parent)
    write_text(target.with_name(LATEST), f"{target.name}\n")


def prune_checkpoints(run_folder: Path, keep: int) -> None:
    """Removes all but the `keep` newest whole checkpoints; keep <= 0 keeps all."""
    if keep > 0:
        for path in list_checkpoints(run_folder, warn=False)[:-keep]:
            # Delete the marker first: after a kill, the remains must not look whole.
            (path / MARKER).unlink()
            shutil.rmtree(path)


def remove_leftovers(run_folder: Path) -> None:
    """Removes the remains of a killed save or prune."""
    for path in run_folder.glob(".iter_*.pth.tmp"):
        shutil.rmtree(path)
    shutil.rmtree(run_folder / UNIVERSAL, ignore_errors=True)
    for path in run_folder.glob("iter_*.pth"):
        if path.is_dir() and not (path / MARKER).is_file():
            shutil.rmtree(path)
