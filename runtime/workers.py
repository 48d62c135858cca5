"""Work spread over processes: one that dies costs one item, not the run."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
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


Outcomes = Generator[Outcome[Item, Result], None, None]


def run_here(open_work: Callable[[], Work[Item, Result]], items: Sequence[Item], report: Report) -> Outcomes[Item, Result]:
    """One item after the other, in this process."""
    work = open_work()
    for item in items:
        yield Outcome(item, begun=True)
        yield _try(work, item, report)


def run_in_processes(
    open_work: Callable[[], Work[Item, Result]], items: Sequence[Item], report: Report, workers: int
) -> Outcomes[Item, Result]:
    """Items in the order in which they end. Each of `workers` processes calls `open_work` once; items and results are pickled.

    Raises:
        ClapsepError: that of `open_work`, if it fails in every process.
        WorkerError: every process died before it could take an item.
    """
    left, running, ended = list(reversed(items)), list[_Worker](), list[_Worker]()
    try:
        while left or running:
            idle = sum(worker.item is None for worker in running)
            running += [_Worker(open_work) for _ in range(min(workers - len(running), len(left) - idle))]
            for ready in wait([worker.connection for worker in running]):
                worker = next(worker for worker in running if worker.connection is ready)
                yield from worker.hear(left, report)
                if worker.over:
                    running.remove(worker)
                    ended.append(worker)
                if worker.error:  # it could not begin; the others may have been luckier
                    workers -= 1
                    if not running and left:
                        raise worker.error
    finally:
        for worker in running:
            worker.end()
        for worker in ended + running:
            worker.join()


class _Worker:
    """A process and what it does at the moment."""

    def __init__(self, open_work: Callable[[], Work[Any, Any]]) -> None:
        context = multiprocessing.get_context("spawn")  # engines do not survive a fork
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, open_work, log.getEffectiveLevel()), daemon=True)
        resource_tracker.ensure_running()  # its start would undo the next line
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is for the parent, which ends this process
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self.item: Any = None
        self.over = False
        self.error: ClapsepError | None = None  # why it could not begin

    def hear(self, left: list[Any], report: Report) -> Iterator[Outcome[Any, Any]]:
        """Its next message; if it is free it gets the next item."""
        kind, value = self._message()
        if kind == "progress":
            report(value)
            return
        if kind == "broken":
            self.error = value
            self.end()
            return
        if kind == "died":
            yield from self._died()
            return
        if kind == "outcome":
            result, error = value
            yield Outcome(self.item, result, error)
        self.item = left.pop() if left else None
        self.over = self.item is None
        if self.over:
            self.end()
            return
        yield Outcome(self.item, begun=True)
        with contextlib.suppress(OSError):  # it died meanwhile: the next message says so
            self.connection.send(self.item)

    def _message(self) -> tuple[str, Any]:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return "died", None

    def _died(self) -> Iterator[Outcome[Any, Any]]:
        self.over = True
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        error = WorkerError(f"the worker process {how}; is there enough memory for so many jobs? (--jobs)")
        if self.item is None:
            self.error = error
        else:
            yield Outcome(self.item, error=error)

    def end(self) -> None:
        """It is to discard what it is doing, and to clean up."""
        self.over = True
        self.connection.close()
        self._process.terminate()

    def join(self) -> None:
        """Wait until it has ended."""
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _main(connection: Connection, open_work: Callable[[], Work[Any, Any]], level: int) -> None:
    """The life of a worker. It ends when its parent does, since the connection ends then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    with contextlib.suppress(EOFError, ConnectionError, Orphaned):
        try:
            work = open_work()
        except ClapsepError as error:
            connection.send(("broken", error))
            return
        connection.send(("ready", None))
        while True:
            outcome = _try(work, connection.recv(), lambda value: _tell(connection, value))
            connection.send(("outcome", (outcome.result, outcome.error)))


def _tell(connection: Connection, value: float) -> None:
    try:
        connection.send(("progress", value))
    except ConnectionError:
        raise Orphaned from None


class Orphaned(BaseException):
    """The parent is gone: nobody wants the result."""


def _try(work: Work[Item, Result], item: Item, report: Report) -> Outcome[Item, Result]:
    try:
        return Outcome(item, result=work(item, report))
    except ClapsepError as error:
        return Outcome(item, error=error)
    except Exception as error:  # whatever a broken file brings to light must not stop the others
        unexpected = WorkerError(f"unexpected {type(error).__name__}: {error}; run it alone with --debug and report it")
        unexpected.__cause__ = error
        return Outcome(item, error=unexpected)
