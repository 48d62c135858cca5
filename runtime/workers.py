"""Work spread over processes: one that dies costs one item, not the run."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from .errors import ClapsepError, WorkerError

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[float], object]  # what a piece of work tells of its progress
Work = Callable[[Item, Report], Result]


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of an item: a result, or the error that stopped it. Before either, `begun` is said once."""

    item: Item
    result: Result | None = None
    error: ClapsepError | None = None
    begun: bool = False


def run_here(open_work: Callable[[], Work[Item, Result]], items: Sequence[Item], report: Report) -> Iterator[Outcome[Item, Result]]:
    """One item after the other, in this process."""
    work = open_work()
    for item in items:
        yield Outcome(item, begun=True)
        yield _try(work, item, report)


def run_in_processes(
    open_work: Callable[[], Work[Item, Result]], items: Sequence[Item], report: Report, workers: int
) -> Iterator[Outcome[Item, Result]]:
    """Items in the order in which they end. Each of `workers` processes calls `open_work` once; items and results are pickled.

    Raises:
        ClapsepError: that of `open_work`, if it fails.
        WorkerError: a process died before it could take an item.
    """
    left, running = list(reversed(items)), list[_Worker]()
    try:
        while left or running:
            running += [_Worker(open_work) for _ in range(min(workers - len(running), len(left) - sum(w.item is None for w in running)))]
            for ready in wait([worker.connection for worker in running]):
                worker = next(worker for worker in running if worker.connection is ready)
                yield from worker.hear(left, report)
                if worker.over:
                    running.remove(worker)
    finally:
        for worker in running:
            worker.stop()


class _Worker:
    """A process and what it does at the moment."""

    def __init__(self, open_work: Callable[[], Work[Any, Any]]) -> None:
        context = multiprocessing.get_context("spawn")  # engines do not survive a fork
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, open_work, log.getEffectiveLevel()), daemon=True)
        self._process.start()
        theirs.close()
        self.item: Any = None
        self.over = False

    def hear(self, left: list[Any], report: Report) -> Iterator[Outcome[Any, Any]]:
        """Its next message; if it is free it gets the next item."""
        kind, value = self._message()
        if kind == "progress":
            report(value)
            return
        if kind == "broken":
            self.stop()
            raise value
        if kind == "died":
            yield self._died()
            return
        if kind == "outcome":
            result, error = value
            yield Outcome(self.item, result, error)
        self.item = left.pop() if left else None
        self.over = self.item is None
        if self.over:
            self.stop()
            return
        yield Outcome(self.item, begun=True)
        with contextlib.suppress(OSError):  # it died meanwhile: the next message says so
            self.connection.send(self.item)

    def _message(self) -> tuple[str, Any]:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return "died", None

    def _died(self) -> Outcome[Any, Any]:
        self.over = True
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        error = WorkerError(f"the worker process {how}; is there enough memory for so many jobs? (--jobs)")
        if self.item is None:
            raise error
        return Outcome(self.item, error=error)

    def stop(self) -> None:
        """It discards what it is doing, and cleans up."""
        self.over = True
        self.connection.close()
        self._process.terminate()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _main(connection: Connection, open_work: Callable[[], Work[Any, Any]], level: int) -> None:
    """The life of a worker. It ends when its parent does, since the connection ends then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            work = open_work()
        except ClapsepError as error:
            connection.send(("broken", error))
            return
        connection.send(("ready", None))
        while True:
            outcome = _try(work, connection.recv(), lambda value: connection.send(("progress", value)))
            connection.send(("outcome", (outcome.result, outcome.error)))


def _try(work: Work[Item, Result], item: Item, report: Report) -> Outcome[Item, Result]:
    try:
        return Outcome(item, result=work(item, report))
    except ClapsepError as error:
        return Outcome(item, error=error)
    except ConnectionError:  # the parent is gone
        raise
    except Exception as error:  # whatever a broken file brings to light must not stop the others
        unexpected = WorkerError(f"unexpected {type(error).__name__}: {error}; run it alone with --debug and report it")
        unexpected.__cause__ = error
        return Outcome(item, error=unexpected)
