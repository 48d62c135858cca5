"""The log of a run: one JSON object per line, appended as work goes on, so that a later run can go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import InputError, OutputError
from .jobs import Job
from .query import Query

NAME = "clapsep.jsonl"
LIMIT = 1 << 30  # bytes
Record = dict[str, Any]


def fingerprint(job: Job, settings: Mapping[str, Any]) -> str:
    """Of everything that decides what a job's outputs hold: mixture, questions, and the settings of the run."""
    asked = {name: _query(query) for name, query in job.asked.targets.items()}
    content = [_file(job.mixture), asked, _query(job.asked.negative), [str(path.name) for path in job.outputs], dict(settings)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _query(query: Query) -> list[Any]:
    return [query.text, query.alpha, [_file(Path(clip)) for clip in query.audio if isinstance(clip, str | Path)]]


def _file(path: Path) -> list[Any]:
    """Enough to notice that a file has been changed."""
    try:
        status = path.stat()
    except OSError:
        return [str(path.absolute()), None, None]
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


class Log:
    """A file of records, each with the outputs that it speaks of. Torn or foreign lines are passed over.

    Raises:
        InputError: the file cannot be read.
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: dict[str, Record] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            if self.path.stat().st_size > LIMIT:
                raise InputError(f"{self.path} is larger than {LIMIT >> 30} GiB, so it is no log of ours; move it away")
            with self.path.open("rb") as file:
                for line in file:
                    self._remember(line)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({error.strerror}); move it away, or choose another with --log") from error

    def _remember(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a run was killed while it wrote this
            return
        if isinstance(record, dict) and isinstance(record.get("outputs"), list):
            for output in record["outputs"]:
                self._last[str(output)] = record

    def add(self, job: Job, status: str, **details: Any) -> None:
        """A line about a job, in one piece, on disk as far as the operating system is concerned."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"time": now, "status": status, "input": str(job.mixture), "outputs": _names(job), **details}
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
            raise OutputError(f"{self.path} cannot be written ({error.strerror}); choose another log with --log") from error
        self._remember(line)

    def finished(self, job: Job, mark: str) -> bool:
        """Whether the outputs that are there are those of this job: it ended well, or it began when they were not there yet.

        Outputs appear whole or not at all, so of a run that was killed either all are there or some are missing.
        """
        if not all(output.is_file() for output in job.outputs):
            return False
        records = [self._last.get(name, {}) for name in _names(job)]
        return all(
            record.get("fingerprint") == mark and (record.get("status") == "done" or record.get("fresh") is True) for record in records
        )


def _names(job: Job) -> list[str]:
    return [str(output.absolute()) for output in job.outputs]
