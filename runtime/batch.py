"""Many mixtures through one bundle: what is left to do, what became of each, and the record of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, sha256_of
from .errors import ClapsepError, OutputError, OutputExists
from .files import Separated, separate_file
from .jobs import Job, Question
from .log import Log, fingerprint
from .outputs import remove_leftovers
from .separator import Separator
from .workers import Outcome, Report, Work, run_here, run_in_processes

SETTINGS = ("engine", "device", "precision", "normalize", "crop", "overlap", "hop", "route")  # that decide what outputs hold


@dataclass
class Summary:
    """What became of a run's jobs."""

    done: list[Separated] = field(default_factory=list)
    failed: list[tuple[Job, ClapsepError]] = field(default_factory=list)
    skipped: int = 0

    @property
    def seconds(self) -> float:
        """Of audio separated."""
        return sum(result.seconds for result in self.done)


@dataclass(frozen=True)
class Task:
    """A job that is to be run: its fingerprint, and whether it may replace outputs that are there."""

    job: Job
    mark: str
    force: bool


@dataclass(frozen=True)
class Batch:
    """A run over jobs.

    Attributes:
        separator: does the work in this process.
        arguments: of that `Separator`; every other process opens one.
        jobs: what to do.
        common: questions that are asked of several mixtures; if one is bad, nothing is run.
        workers: processes with engines of their own; 1 works in this process.
        force: replace outputs that are there.
        log: where to write what happens, or None.
        resume: leave out what the log says an earlier run made, and replace what of a job it made in part.
    """

    separator: Separator
    arguments: Mapping[str, Any]
    jobs: Sequence[Job]
    common: Sequence[Question] = ()
    workers: int = 1
    force: bool = False
    log: Log | None = None
    resume: bool = False

    def tasks(self) -> list[Task]:
        """What is left to do.

        Raises:
            OutputExists: an output is there that is not this run's, and `force` is not set.
        """
        bundle = sha256_of(self.separator.bundle.path / MANIFEST)
        settings = {"bundle": bundle, **{name: self.arguments.get(name) for name in SETTINGS}}
        tasks = (self._task(job, fingerprint(job, settings)) for job in self.jobs)
        return [task for task in tasks if task is not None]

    def _task(self, job: Job, mark: str) -> Task | None:
        made = self.log.made(job, mark) if self.log and self.resume else []
        if len(made) == len(job.outputs):
            return None
        foreign = [path for path in job.outputs if os.path.lexists(path) and path not in made]
        if foreign and not self.force:
            raise OutputExists(f"{foreign[0]} exists{self._doubt(foreign[0], mark)}")
        return Task(job, mark, self.force or bool(made))

    def _doubt(self, output: Path, mark: str) -> str:
        """Why an output is in the way, and what to do."""
        if self.log and self.resume:
            return f" and {self.log.doubt(output, mark)}; pass --force to make it again, or choose another output"
        return "; choose another name, or pass --force" + (", or --resume to go on with an earlier run" if self.log else "")

    def run(self, tasks: Sequence[Task], report: Report, finished: Callable[[Job], object]) -> Summary:
        """Run the tasks; a failure stops only its own.

        Args:
            report: is told how many seconds of audio have been read since its last call.
            finished: is told of each job that ended well.

        Raises:
            InputError: another run writes to the same log.
            OutputError: a folder or the log cannot be written.
            ClapsepError: nothing can be run: a graph does not open, a common question is bad.
        """
        for folder in sorted({output.parent for job in self.jobs for output in job.outputs}):
            _prepare(folder)
        common, log = tuple(self.common), None if self.log is None else self.log.path
        workers, summary = min(self.workers, len(tasks)), Summary(skipped=len(self.jobs) - len(tasks))
        with contextlib.ExitStack() as stack:
            if self.log:
                stack.enter_context(self.log.alone())
            if workers < 2:
                run = run_here(partial(_work, self.separator, common, log), tasks, report)
            else:
                run = run_in_processes(partial(_open_work, dict(self.arguments), common, log), tasks, report, workers)
            for outcome in stack.enter_context(contextlib.closing(run)):
                self._note(outcome, summary, finished)
        return summary

    def _note(self, outcome: Outcome[Task, Separated], summary: Summary, finished: Callable[[Job], object]) -> None:
        job, result, error = outcome.item.job, outcome.result, outcome.error
        if outcome.begun:
            self._log(job, "started")
        if result:
            summary.done.append(result)
            self._log(job, "done", **vars(result), rtf=result.rtf)
            finished(job)
        if error:
            summary.failed.append((job, error))
            self._log(job, "failed", error=type(error).__name__, message=str(error))

    def _log(self, job: Job, status: str, **details: Any) -> None:
        if self.log:
            self.log.add(job, status, **details)


def _prepare(folder: Path) -> None:
    """Make it, and clear away what killed runs left in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created ({error.strerror}); choose another place") from error
    remove_leftovers(folder)


def _open_work(arguments: Mapping[str, Any], common: Sequence[Question], log: Path | None) -> Work[Task, Separated]:
    return _work(Separator(**arguments), common, log)


def _work(separator: Separator, common: Sequence[Question], log: Path | None) -> Work[Task, Separated]:
    """Make sure of the common questions; what comes back separates a job's mixture."""
    for question in common:
        separator.condition(*question)
    record = None if log is None else Log(log, read=False)

    def work(task: Task, report: Report) -> Separated:
        def publish(files: dict[Path, tuple[int, int]]) -> None:
            report(0.0)  # if nobody hears it, nobody wants the outputs
            if record:
                record.add_made(task.job, task.mark, files)

        job = task.job
        conditions = [separator.condition(*question) for question in job.asked.questions]
        return separate_file(separator, job.mixture, job.outputs, conditions, force=task.force, progress=report, publish=publish)

    return work
