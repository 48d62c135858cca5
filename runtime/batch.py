"""Many mixtures through one bundle: what is left to do, what became of each, and the record of it."""

from __future__ import annotations

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
from .workers import Report, Work, run_here, run_in_processes

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
class Batch:
    """A run over jobs.

    Attributes:
        separator: arguments of `Separator`; every worker opens one.
        jobs: what to do.
        common: questions that are asked of several mixtures; if one is bad, nothing is run.
        workers: processes with engines of their own; 1 works in this process.
        force: replace outputs that are there.
        log: where to write what happens, or None.
        resume: leave out what the log says an earlier run finished.
    """

    separator: Mapping[str, Any]
    jobs: Sequence[Job]
    common: Sequence[Question] = ()
    workers: int = 1
    force: bool = False
    log: Path | None = None
    resume: bool = False

    def left(self) -> list[Job]:
        """The jobs that are to be run.

        Raises:
            OutputExists: an output is there that is not this run's, and `force` is not set.
        """
        record = Log(self.log) if self.log and self.resume else None
        left = [job for job in self.jobs if not (record and record.finished(job, self._mark(job)))]
        taken = next((output for job in left for output in job.outputs if os.path.exists(output)), None)
        if taken and not self.force:
            if self.resume:
                raise OutputExists(
                    f"{taken} exists and is not what this run would make; pass --force to replace it, or choose another output"
                )
            raise OutputExists(f"{taken} exists; choose another name, or pass --force, or --resume to go on with an earlier run")
        return left

    def run(self, left: Sequence[Job], report: Report, finished: Callable[[Job], object]) -> Summary:
        """Run the jobs that are `left`; a failure stops only its own.

        Args:
            report: is told how many seconds of audio have been read since its last call.
            finished: is told of each job that ended well.

        Raises:
            OutputError: a folder or the log cannot be written.
            ClapsepError: nothing can be run: the bundle does not open, the engine cannot run here, a common question is bad.
        """
        for folder in sorted({output.parent for job in left for output in job.outputs}):
            _prepare(folder)
        record = Log(self.log) if self.log else None
        open_work = partial(_open_work, dict(self.separator), tuple(self.common), self.force)
        workers, summary = min(self.workers, len(left)), Summary(skipped=len(self.jobs) - len(left))
        run = run_here(open_work, left, report) if workers < 2 else run_in_processes(open_work, left, report, workers)
        marks: dict[tuple[Path, ...], str] = {}  # of the mixtures as they were when their jobs began
        for outcome in run:
            job, result, error = outcome.item, outcome.result, outcome.error
            if outcome.begun and record:
                marks[job.outputs] = self._mark(job)
                fresh = not any(os.path.exists(output) for output in job.outputs)
                record.add(job, "started", fresh=fresh, fingerprint=marks[job.outputs])
            if result:
                summary.done.append(result)
                if record:
                    record.add(job, "done", fingerprint=marks.pop(job.outputs), **vars(result), rtf=result.rtf)
                finished(job)
            if error:
                summary.failed.append((job, error))
                if record:
                    record.add(job, "failed", error=type(error).__name__, message=str(error))
        return summary

    def _mark(self, job: Job) -> str:
        bundle = sha256_of(Path(self.separator["bundle"]) / MANIFEST)
        return fingerprint(job, {"bundle": bundle, **{name: self.separator.get(name) for name in SETTINGS}})


def _prepare(folder: Path) -> None:
    """Make it, and clear away what killed runs left in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created ({error.strerror}); choose another place") from error
    remove_leftovers(folder)


def _open_work(arguments: Mapping[str, Any], common: Sequence[Question], force: bool) -> Work[Job, Separated]:
    """Open the bundle and make sure of the common questions; what comes back separates a job's mixture."""
    separator = Separator(**arguments)
    for question in common:
        separator.condition(*question)

    def work(job: Job, report: Report) -> Separated:
        conditions = [separator.condition(*question) for question in job.asked.questions]
        return separate_file(separator, job.mixture, job.outputs, conditions, force=force, progress=report)

    return work
