"""The log of a run: one JSON object per line, appended as work goes on, so that a later run can go on where it stopped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import InputError, OutputError
from .jobs import Job
from .query import Query

NAME = "clapsep.jsonl"
LIMIT = 1 << 30  # bytes


def fingerprint(job: Job, settings: Mapping[str, Any]) -> str:
    """Of everything that decides what a job's outputs hold: mixture, questions, and the settings of the run."""
    asked = {name: _query(query) for name, query in job.asked.targets.items()}
    content = [_file(job.mixture), asked, _query(job.asked.negative), [str(path.name) for path in job.outputs], dict(settings)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _query(query: Query) -> list[Any]:
    vector = [_file(Path(query.vector))] if isinstance(query.vector, str | Path) else []
    return [query.text, query.alpha, [_file(Path(clip)) for clip in query.audio if isinstance(clip, str | Path)], vector]


def _file(path: Path) -> list[Any]:
    """Enough to notice that a file has been changed."""
    return [os.path.abspath(path), *(identity(path) or (None, None))]


def identity(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time in ns of a file; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class Log:
    """A file of records, each of which speaks of one job and its outputs. Torn lines are passed over.

    Before a job's outputs get their names, a record `made` says how large they are and when they were written; so a later run can tell
    them from all others, whatever happened in between.

    Raises:
        InputError: the file cannot be read, or is no log.
    """

    def __init__(self, path: Path, *, read: bool = True) -> None:
        self.path = path
        self._made: dict[str, tuple[str, list[int]]] = {}  # fingerprint, size and time of each output that was made
        if read and os.path.lexists(path):
            self._read()

    def _read(self) -> None:
        known, size = 0, 0
        try:
            if self.path.stat().st_size > LIMIT:
                raise InputError(f"{self.path} is larger than {LIMIT >> 30} GiB, so it is no log of ours; move it away")
            with self.path.open("rb") as file:
                for line in file:
                    size += len(line.strip())
                    known += self._remember(line)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({error.strerror}); move it away, or choose another with --log") from error
        if size and not known:
            raise InputError(f"{self.path} is no log of an earlier run; move it away, or choose another with --log")

    def _remember(self, line: bytes) -> bool:
        """Whether the line is a record of ours."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a run was killed while it wrote this
            return False
        if not isinstance(record, dict) or not isinstance(record.get("status"), str) or not isinstance(record.get("files"), dict | None):
            return False
        for output, status in (record.get("files") or {}).items():
            self._made[output] = (str(record.get("fingerprint")), status)
        return True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other run writes here meanwhile.

        Raises:
            InputError: one does.
            OutputError: the file cannot be written.
        """
        try:
            file = self.path.open("ab")
        except OSError as error:
            raise self._unwritable(error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"another run is writing to {self.path}; wait for it, or choose another directory") from error
            yield

    def add(self, job: Job, status: str, **details: Any) -> None:
        """A line about a job, in one piece; several processes may do this.

        Raises:
            OutputError: it cannot be written.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"time": now, "status": status, "input": str(job.mixture), "outputs": [str(path) for path in job.outputs], **details}
        line = json.dumps(record).encode() + b"\n"
        try:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                end = os.lseek(file, 0, os.SEEK_END)
                torn = end > 0 and os.pread(file, 1, end - 1) != b"\n"
                os.write(file, b"\n" * torn + line)
            finally:
                os.close(file)
        except OSError as error:
            raise self._unwritable(error) from error

    def add_made(self, job: Job, mark: str, files: Mapping[Path, tuple[int, int]]) -> None:
        """That these outputs, with their sizes and times, are about to get their names."""
        self.add(job, "made", fingerprint=mark, files={os.path.abspath(path): status for path, status in files.items()})

    def made(self, job: Job, mark: str) -> list[Path]:
        """Those of the job's outputs that are there and were made for it."""
        return [path for path in job.outputs if self._made.get(os.path.abspath(path)) == (mark, list(identity(path) or ()))]

    def doubt(self, output: Path, mark: str) -> str:
        """Why an output that is there is not taken for one that was made with this fingerprint."""
        if not os.path.exists(self.path):
            return f"{self.path} is not there to say what made it"
        made, _ = self._made.get(os.path.abspath(output), ("", []))
        if not made:
            return f"{self.path} does not say what made it"
        return "has been changed since it was made" if made == mark else "its mixture, question, bundle or settings have changed since"

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path} cannot be written ({error.strerror}); choose another log with --log")
