"""CPU time and peak memory of commands."""

from __future__ import annotations

import resource
import threading
from pathlib import Path


def cpu_of_children() -> float:
    """Returns the CPU seconds of all child processes that have ended.

    On a busy machine they are more reliable than elapsed time.
    """
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class MemoryPeak:
    """Samples the memory (proportional set size) of a process and its descendants, five times a second."""

    def __init__(self, pid: int):
        self._pid, self._peak = pid, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Stops sampling; returns the peak in bytes."""
        self._end.set()
        self._thread.join()
        return self._peak

    def _sample(self) -> None:
        while not self._end.wait(0.2):
            self._peak = max(self._peak, sum(map(self._bytes, self._family(self._pid))))

    def _family(self, pid: int) -> list[int]:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return []
        return [pid, *(each for child in children for each in self._family(int(child)))]

    @staticmethod
    def _bytes(pid: int) -> int:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return 0
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
