"""Lets a test change a file of a fixture and restores it."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def kept(path: Path):
    """Yields `path`, then restores the bytes and times of the file."""
    data, stat = path.read_bytes(), path.stat()
    try:
        yield path
    finally:
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
