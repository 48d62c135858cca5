"""Hostile job lists, and logs of earlier runs."""

from __future__ import annotations

import json
from pathlib import Path

from clapsep.runtime.jobs import Asked, plan_jobs
from clapsep.runtime.log import Log, fingerprint
from clapsep.runtime.query import Query

from .mutators import damage, edit_json
from .target import target, written

ASKED = Asked({"": Query("rain")}, Query())
LINES = (
    {"input": "a.wav"},
    {"input": "b.wav", "output": "deep/b.flac", "positive": "a dog", "negative": "rain", "alpha": 0.25},
    {"input": "a.wav", "output": "c.wav", "positive_audio": ["a.wav", "b.wav"], "negative_audio": "b.wav"},
    {"input": "b.wav", "output": "d.ogg", "targets": {"dog": "a dog", "rain": "rain"}},
)
ROWS = 'input,output,positive,negative,positive_audio,alpha\na.wav,,"a dog, barking",rain,a.wav;b.wav,0.5\nb.wav,x.wav,rain,,,\n'


def _furnish() -> None:
    for name in ("a.wav", "b.wav"):
        Path(name).touch()


@target(lambda: [json.dumps(line).encode() for line in LINES], edit_json, damage)
def job_list(data: bytes) -> None:
    """A line of a .jsonl file, between two good ones."""
    _furnish()
    good = [json.dumps({"input": "a.wav", "output": f"good{i}.wav"}).encode() for i in range(2)]
    jobs = plan_jobs([str(written(b"\n".join([good[0], data, good[1]]), "jobs.jsonl"))], Path("out"), ASKED)
    _below(jobs)


@target(lambda: [ROWS.encode(), b"\xef\xbb\xbf" + ROWS.replace("\n", "\r\n").encode()], damage)
def job_table(data: bytes) -> None:
    """A .csv file."""
    _furnish()
    _below(plan_jobs([str(written(data, "jobs.csv"))], Path("out"), ASKED))


def _below(jobs: list) -> None:
    for job in jobs:
        for output in job.outputs:
            assert output.resolve().is_relative_to(Path("out").resolve()), f"{output} is not below out"


def _log() -> list[bytes]:
    _furnish()
    (job,) = plan_jobs(["a.wav"], Path("out/x.wav").parent, ASKED)
    path = Path("log.jsonl")
    path.unlink(missing_ok=True)
    log = Log(path)
    log.add(job, "started")
    log.add_made(job, fingerprint(job, {}), {Path("out/a.wav"): (3, 5)})
    return path.read_bytes().splitlines()


@target(_log, edit_json, damage)
def run_log(data: bytes) -> None:
    """The log of an earlier run, read and added to."""
    _furnish()
    Path("out").mkdir(exist_ok=True)
    Path("out/a.wav").touch()
    (job,) = plan_jobs(["a.wav"], Path("out"), ASKED)
    log = Log(written(data, "log.jsonl"))
    log.made(job, fingerprint(job, {}))
    log.add(job, "started")
    log.add_made(job, "x", {Path("out/a.wav"): (3, 5)})
    assert not Log(Path("log.jsonl")).made(job, "x"), "another file was taken for what was made"
    assert Path("log.jsonl").read_bytes().startswith(data), "the log was not added to"
