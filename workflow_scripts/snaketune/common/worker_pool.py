"""Runs a function over a stream of items in worker processes; results come in the order of the items.

Workers are processes because much of the work, besides the tokenizer, is pure Python. They are forked, so the
tokenizer is loaded once. Each has one pipe that no other process holds, so all workers exit with the parent,
even after kill -9. Each worker has at most a few items in flight, so memory does not grow with the stream.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from snaketune.common.cli import UserError

# Per worker, results that may wait for an earlier one.
_AHEAD = 4


def available_cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool:
    """A pool of worker processes for one function. Use it as a context manager.

    Args:
        function: Called as `function(*item)`. `map` raises any `UserError` that it raises.
        processes: Number of workers; with 1, the function runs in this process.
    """

    def __init__(self, function: Callable[..., Any], processes: int):
        self._function = function
        self._count = processes if processes > 1 else 0
        self._pipes: list[Connection] = []
        self._children: list[multiprocessing.Process] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for child in self._children:
            if kind is not None:
                child.terminate()
            child.join()
        self._pipes, self._children = [], []

    def map(self, items: Iterable[tuple]) -> Iterator[Any]:
        """Yields the function's result for each item, in order. One `map` at a time.

        Raises:
            UserError: The function raised one. If several items fail, the first in order counts.
            RuntimeError: A worker died (usually out of memory) or raised another exception.
        """
        items = iter(items)
        first_two = list(itertools.islice(items, 2))
        if not self._count or len(first_two) < 2:
            # A single item needs no worker.
            yield from (self._function(*item) for item in itertools.chain(first_two, items))
            return
        self._start()
        yield from self._map(itertools.chain(first_two, items))

    def _map(self, items: Iterator[tuple]) -> Iterator[Any]:
        idle = list(self._pipes)
        done: dict[int, tuple[bool, Any]] = {}
        running: dict[Connection, int] = {}
        sent = given = 0
        more = True
        while True:
            while more and idle and sent - given < _AHEAD * len(self._pipes):
                item = next(items, None)
                more = item is not None
                if more:
                    pipe = idle.pop()
                    self._exchange(pipe.send, item)
                    running[pipe] = sent
                    sent += 1
            if given == sent:
                return
            for pipe in wait(list(running)) if running else ():
                done[running.pop(pipe)] = self._exchange(pipe.recv)
                idle.append(pipe)
            # Keep the workers busy before yielding results.
            if more and idle and sent - given < _AHEAD * len(self._pipes):
                continue
            while given in done:
                good, value = done.pop(given)
                given += 1
                if not good:
                    raise value
                yield value

    def _exchange(self, call: Callable, *args: Any) -> Any:
        try:
            return call(*args)
        except (EOFError, OSError):
            raise RuntimeError(
                "a tokenising worker died (out of memory?); "
                "run again, with fewer --threads if memory is short"
            ) from None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        # Freeze the existing objects: scanning them in a worker would copy their memory pages.
        gc.collect()
        gc.freeze()
        while len(self._children) < self._count:
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            # A child must close the parent's end of every pipe, its own included.
            child = context.Process(
                target=_work, args=(self._function, theirs, list(self._pipes)), daemon=True
            )
            with warnings.catch_warnings():
                # Python 3.12 warns because a library of NumPy's has threads; the workers do not use it.
                warnings.simplefilter("ignore", DeprecationWarning)
                child.start()
            theirs.close()
            self._children.append(child)


def _work(function: Callable[..., Any], pipe: Connection, to_close: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for other in to_close:
        other.close()
    try:
        while True:
            try:
                item = pipe.recv()
            except EOFError:
                return
            try:
                result = True, function(*item)
            except UserError as error:
                result = False, error
            except Exception as error:  # sent to the parent, which raises it
                result = False, RuntimeError(f"{type(error).__name__}: {error}")
            pipe.send(result)
    except (BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
