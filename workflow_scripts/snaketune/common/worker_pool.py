"""Runs a function over a stream of items in worker processes, results in the order of the items.

Processes, because besides the tokenizer a good part of the work is Python's own. They are forked, so the tokenizer
is loaded once; each has one pipe that nobody else holds, so all end when the parent does, even by kill -9. At most a few
items a worker are under way, so memory does not grow with the stream.
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

# Results that wait for an earlier one, per worker.
_AHEAD = 4


def available_cpus() -> int:
    """Returns the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool:
    """A pool for one function; use it as a context manager.

    Args:
        function: Called as `function(*item)`. A `UserError` that it raises comes out of `map`.
        processes: Number of workers; 1 calls the function here.
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
            UserError: The function raised one; that of the first item that failed.
            RuntimeError: A worker ended (killed for want of memory, mostly) or raised something else.
        """
        items = iter(items)
        first_two = list(itertools.islice(items, 2))
        if not self._count or len(first_two) < 2:
            # One block needs no worker.
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
            # Keep the workers busy before the result is dealt with.
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
                "a tokenising worker ended before it was done (killed for want of memory?); "
                "run again, with fewer --threads if memory is short"
            ) from None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        # What is there now stays. Left to the collector, every worker would copy the pages that it looks through.
        gc.collect()
        gc.freeze()
        while len(self._children) < self._count:
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            # A child must not keep the parent's ends of any pipe open, its own included.
            child = context.Process(
                target=_work, args=(self._function, theirs, list(self._pipes)), daemon=True
            )
            with warnings.catch_warnings():
                # Python 3.12 warns because NumPy's library has threads; the workers do not use it.
                warnings.simplefilter("ignore", DeprecationWarning)
                child.start()
            theirs.close()
            self._children.append(child)


def _work(function: Callable[..., Any], pipe: Connection, to_close: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
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
