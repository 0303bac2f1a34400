"""Atomic file writes, and hashes of files and JSON values.

Every writer creates a temporary file beside the target, flushes it to disk and renames it. A killed job never
leaves an incomplete file under its final name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from snaketune.common.cli import UserError

_CHUNK = 1 << 20


def sha256_file(path: str | os.PathLike) -> str:
    """Returns the hex SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Returns the hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fsync_path(path: str | os.PathLike) -> None:
    """Flushes a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Hard-links `target` to `source`; copies if the file systems differ or do not support hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        fsync_path(target)


@contextmanager
def told_when_full(path: str | os.PathLike) -> Iterator[None]:
    """Turns "no space left" errors while writing `path` into a UserError that names the full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = Path(path).absolute().parent
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(folder).free / 1e6:,.0f} MB free"
        raise UserError(
            f"cannot write {path}",
            found=f"{error.strerror}{free}",
            expected=f"free space in {folder}",
            fix="free some space or write to another disk, then run again; no incomplete files are left",
        ) from None


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it into place on success, removes it on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with told_when_full(path):
            yield temporary
            fsync_path(temporary)
            temporary.replace(path)
            fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; replaces `path` with it on success.

    An existing `path` is moved aside before the rename and removed after it.
    """
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with resumable_dir(path, temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def resumable_dir(path: str | os.PathLike, temporary: Path | None = None) -> Iterator[Path]:
    """Like `atomic_dir`, but a killed process's temporary folder is kept and reused by the next attempt.

    Args:
        path: The folder to create.
        temporary: The temporary folder; `.<name>.partial` beside `path` by default. An error removes it, a
            kill does not.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or path.with_name(f".{path.name}.partial")
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    temporary.mkdir(exist_ok=True)
    try:
        with told_when_full(path):
            yield temporary
            for root, _, names in os.walk(temporary):
                for name in names:
                    fsync_path(Path(root) / name)
                fsync_path(root)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        path.rename(aside)
    temporary.rename(path)
    fsync_path(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a whole UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file atomically: sorted keys, two-space indent, UTF-8, so equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
