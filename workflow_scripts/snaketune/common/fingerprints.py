"""Content digests of input files, cached by size and mtime.

The workflow reruns a job when the *content* of an input changed, and a training is identified by the content
of its model and data. Each version of a file is hashed once: the cache maps an absolute path to size, mtime
(nanoseconds) and SHA-256, so later calls only stat the file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from snaketune.common.files import sha256_file, sha256_json, write_json


class FingerprintCache:
    """Caches file digests in a JSON file. A damaged cache is never an error: the files are hashed again."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()  # saved at exit, after Snakemake has left --directory
        self._changed = False
        try:
            self._known: dict[str, list] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def file(self, path: str | Path) -> str:
        """Returns the hex SHA-256 of a file, from the cache if size and mtime are unchanged."""
        path = Path(path).absolute()
        stat = path.stat()
        known = self._known.get(str(path))
        if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return known[2]
        if stat.st_size > 1 << 30:
            print(f"hashing {path} ({stat.st_size / 1e9:.1f} GB), once", file=sys.stderr, flush=True)
        digest = sha256_file(path)
        # A file modified just now can change again without a new mtime: do not cache it yet.
        if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
            self._known[str(path)] = [stat.st_size, stat.st_mtime_ns, digest]
            self._changed = True
        return digest

    def files(self, paths: Iterable[str | Path], root: str | Path) -> str:
        """Returns one digest over files: their paths relative to `root` and their contents."""
        root = Path(root).absolute()
        entries = [[str(Path(p).absolute().relative_to(root)), self.file(p)] for p in sorted(map(str, paths))]
        return sha256_json(entries)

    def save(self) -> None:
        """Writes the cache if anything was added. If that fails, prints a warning and continues."""
        if not self._changed:
            return
        try:
            write_json(self.path, self._known)
        except OSError as error:
            print(f"warning: could not save the fingerprint cache: {error}", file=sys.stderr)
        self._changed = False
