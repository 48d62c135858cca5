"""What a run has to do: mixtures from files, folders, patterns and job lists, and where each result goes."""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from .audiofile import FORMATS, READABLE
from .errors import InputError, QueryError
from .query import Query

LISTS = (".jsonl", ".csv")
SUFFIXES = (*FORMATS, *READABLE)  # that are taken from folders
LIST_LIMIT = 1 << 26  # bytes
SIDES = {side: (side, f"{side}_audio", f"{side}_vector") for side in ("positive", "negative")}
FIELDS = ("input", "output", *SIDES["positive"], *SIDES["negative"], "alpha", "targets")
Question = tuple[Query, Query]


@dataclass(frozen=True)
class Asked:
    """What every mixture is asked, but those whose line in a job list asks something itself.

    Attributes:
        targets: a positive query for each name; a single one without a name has the name "".
        negative: what to leave out of each of them.
    """

    targets: Mapping[str, Query]
    negative: Query

    @property
    def empty(self) -> bool:
        return self.negative.empty and all(query.empty for query in self.targets.values())

    @property
    def questions(self) -> tuple[Question, ...]:
        return tuple((query, self.negative) for query in self.targets.values())

    @property
    def clips(self) -> Iterator[Path]:
        """Files of examples and vectors, which no output may replace."""
        queries = (self.negative, *self.targets.values())
        return (Path(file) for query in queries for file in (*query.audio, query.vector) if isinstance(file, str | Path))


@dataclass(frozen=True)
class Job:
    """One mixture, an output for each question, and where in a job list it stands."""

    mixture: Path
    outputs: tuple[Path, ...]
    asked: Asked
    where: str = ""


@dataclass(frozen=True)
class _Found:
    """A mixture, the place of its result below the output folder, and what is asked of it."""

    mixture: Path
    place: PurePath
    asked: Asked
    where: str = ""


def plan_jobs(inputs: Sequence[str], output: Path, asked: Asked) -> list[Job]:
    """One job for each mixture that the inputs name.

    Args:
        inputs: files, folders (all audio files below), patterns such as `rec/**/*.flac`, job lists (.jsonl, .csv).
        output: a file if there is one mixture with one question, else a folder, in which folders keep their structure.

    Raises:
        InputError: an input is not there, a job list cannot be read, or outputs would replace inputs, examples or each other.
    """
    found = [item for text in inputs for item in _find(text, output, asked)]
    if into_folder(inputs, output, asked):
        if not os.path.isdir(output) and (os.path.exists(output) or str(output) == "-" or output.suffix.lower() in FORMATS):
            raise InputError(f"{output} cannot be the directory for {len(found)} mixtures and their results; give a directory")
        jobs = [Job(item.mixture, tuple(_outputs(item, output)), item.asked, item.where) for item in found]
    elif not os.path.isdir(output.parent):
        raise InputError(f"{output.parent} is not a directory; create it first")
    else:
        jobs = [Job(item.mixture, (output,), item.asked, item.where) for item in found]
    _check(jobs)
    return jobs


def into_folder(inputs: Sequence[str], output: Path, asked: Asked) -> bool:
    """Whether `output` is a folder: it is one, has no extension, or several results go there."""
    several = len(inputs) > 1 or any(not os.path.isfile(text) or _is_list(text) for text in inputs)
    return os.path.isdir(output) or several or list(asked.targets) != [""] or not output.suffix


def _outputs(item: _Found, folder: Path) -> Iterator[Path]:
    """`street.wav` becomes `street.wav`, or `street.dog.wav` and so on for named targets; what cannot be written becomes .wav."""
    suffix = item.place.suffix if item.place.suffix.lower() in FORMATS else ".wav"
    for name in item.asked.targets:
        stem = f"{item.place.stem}.{name}" if name else item.place.stem
        yield folder / item.place.with_name(stem + suffix)


def _check(jobs: Sequence[Job]) -> None:
    """Whatever would go wrong for sure is said before anything is computed."""
    targets = [target for job in jobs for target in job.outputs]
    mixtures = {os.path.realpath(job.mixture) for job in jobs}
    clips = {os.path.realpath(clip) for asked in {id(job.asked): job.asked for job in jobs}.values() for clip in asked.clips}
    for target in targets:
        if os.path.realpath(target) in mixtures:
            raise InputError(f"{target} would overwrite a mixture; choose another output")
        if os.path.realpath(target) in clips:
            raise InputError(f"{target} would overwrite an example of a query; choose another output")
        if target.suffix.lower() not in FORMATS:
            raise InputError(f"{target} has no known audio extension; use one of: {' '.join(FORMATS)}")
    _refuse_twice(jobs)


def _refuse_twice(jobs: Sequence[Job]) -> None:
    """Where a file system knows no case, names that differ in nothing else are one."""
    first: dict[str, Path] = {}
    for job in jobs:
        for target in job.outputs:
            name = os.path.abspath(target)
            other = first.setdefault(name.casefold() if sys.platform in ("darwin", "win32") else name, job.mixture)
            if other is not job.mixture or len(set(job.outputs)) < len(job.outputs):
                message = f"two results would both be written to {target}, of {other} and of {job.mixture}"
                raise InputError(f"{message}; separate them into different directories, or name them in a job list")


def _is_list(text: str) -> bool:
    return Path(text).suffix.lower() in LISTS


def _find(text: str, output: Path, asked: Asked) -> Iterable[_Found]:
    path = Path(text)
    if os.path.isdir(path):
        return _in_folder(path, output, asked)
    if os.path.isfile(path):
        return _in_list(path, asked) if _is_list(text) else [_Found(path, PurePath(path.name), asked)]
    if not glob.has_magic(text):
        raise InputError(f"{text} is not a file; check the path")
    results = Path(os.path.realpath(output))
    files = [name for name in sorted(glob.glob(text, recursive=True)) if os.path.isfile(name)]
    mixtures = [Path(name) for name in files if not Path(os.path.realpath(name)).is_relative_to(results)]
    if not mixtures:
        raise InputError(f"{text} matches no file{' but results' * bool(files)}; check the pattern")
    return [_Found(file, _below_pattern(file, path), asked) for file in mixtures]


def _below_pattern(file: Path, pattern: Path) -> PurePath:
    """Results keep the structure below the folder in which a pattern begins to be one."""
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1]))
    place = PurePath(os.path.relpath(file, root))
    return PurePath(file.name) if ".." in place.parts else place


def _in_folder(folder: Path, output: Path, asked: Asked) -> list[_Found]:
    """Audio files by their extensions; neither hidden ones nor those in the output folder."""
    results, files = os.path.realpath(output), []
    if results == os.path.realpath(folder):
        raise InputError(f"{output} holds the mixtures; choose another directory for the results")

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); leave it out, or change its permissions") from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and os.path.realpath(Path(place, name)) != results)
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
    if not files:
        raise InputError(f"{folder} holds no audio files ({' '.join(SUFFIXES)}); check the path")
    return [_Found(file, file.relative_to(folder), asked) for file in files]


def _in_list(path: Path, asked: Asked) -> list[_Found]:
    """The lines of a job list; paths in it are relative to its folder."""
    if path.stat().st_size > LIST_LIMIT:
        raise InputError(f"{path} is larger than {LIST_LIMIT >> 20} MiB, so it is no job list; split it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}); check the file") from error
    rows = _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)
    found = [_line(f"{path} line {number}", path.parent, row, asked) for number, row in rows]
    if not found:
        raise InputError(f"{path} has no jobs; give one per line")
    return found


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # other line ends may be parts of texts
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise InputError(f'{path} line {number} is not an object; write {{"input": "street.wav", "positive": "a dog barking"}}')
        yield number, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first line names the columns; several examples are separated by semicolons."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path} line {reader.line_num} has other columns than the first line; quote texts that hold commas")
            given: dict[str, Any] = {key: value for key, value in row.items() if value.strip()}
            for name in ("positive_audio", "negative_audio"):
                given |= {name: [clip.strip() for clip in given[name].split(";")]} if name in given else {}
            if "targets" in given:
                given["targets"] = _targets(f"{path} line {reader.line_num}", given["targets"])
            yield reader.line_num, given
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num} is not CSV ({error}); check the quotes") from error


def _targets(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{where}: targets must be like {{"dog": "a dog barking"}}, with its quotes doubled in CSV ({error})') from error


def _line(where: str, folder: Path, row: Mapping[str, Any], asked: Asked) -> _Found:
    unknown = sorted(set(row) - set(FIELDS))
    if unknown:
        raise InputError(f"{where} has the unknown field '{unknown[0]}'; use {', '.join(FIELDS)}")
    for name in ("input", "output", "positive", "negative"):
        if not isinstance(row.get(name, ""), str):
            raise InputError(f"{where}: {name} is not a text; put it in quotes")
    if not row.get("input"):
        raise InputError(f"{where} has no input; name an audio file")
    mixture = folder / _path(where, row["input"])
    if not os.path.isfile(mixture):
        raise InputError(f"{where}: {mixture} is not a file; paths are relative to the job list")
    place = PurePath(_path(where, row.get("output") or mixture.name))
    if place.is_absolute() or ".." in place.parts or not place.name:
        raise InputError(f"{where}: the output {place} is not below the output directory; give a relative path without ..")
    if row.get("output") and place.suffix.lower() not in FORMATS:
        raise InputError(f"{where}: the output {place} has no known audio extension; use one of: {' '.join(FORMATS)}")
    return _Found(mixture, place, _asked(where, folder, row, asked), where)


def _asked(where: str, folder: Path, row: Mapping[str, Any], asked: Asked) -> Asked:
    """What the line asks, or what is asked of all mixtures if it asks nothing."""
    alpha = _number(where, row.get("alpha", asked.negative.alpha))
    if not set(row) & {*SIDES["positive"], *SIDES["negative"], "targets"}:
        if "alpha" in row:
            raise InputError(f"{where} gives an alpha and no query; give both or neither")
        return asked
    positive, negative = (_query(where, folder, row, side, alpha) for side in SIDES)
    targets = row.get("targets")
    if targets is None:
        line = Asked({"": positive}, negative)
    elif not isinstance(targets, dict) or not targets or "positive" in row or not positive.empty:
        raise InputError(f'{where}: targets must be like {{"dog": "a dog barking"}}, without another positive query')
    else:
        line = Asked({check_name(f"{where}: target {name}", name, text): Query(text) for name, text in targets.items()}, negative)
    if line.empty:
        raise InputError(f"{where} asks for nothing; give positive, negative, an example or targets")
    return line


def check_name(where: str, name: str, text: object) -> str:
    """The name of a target, which becomes part of a file's name; raises InputError if it cannot be one, or there is no text."""
    safe = 0 < len(name) <= 64 and all(letter.isalnum() or letter in "_-" for letter in name)
    if not (safe and isinstance(text, str) and text.strip()):
        raise InputError(f"{where} is not NAME=TEXT with a name of letters, digits, - and _; give dog='a dog barking'")
    return name


def _number(where: str, value: object) -> float:
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: alpha is {value!r}; give a number from 0 to 1") from error
    if not 0 <= number <= 1:
        raise InputError(f"{where}: alpha is {value!r}; give a number from 0 to 1")
    return number


def _query(where: str, folder: Path, row: Mapping[str, Any], side: str, alpha: float) -> Query:
    text, audio, vector = SIDES[side]
    named = row.get(vector)
    if not (named is None or (isinstance(named, str) and named)):
        raise InputError(f"{where}: {vector} is {named!r}; name an .npy file")
    try:
        return Query(
            row.get(text), _clips(where, folder, row.get(audio, [])), alpha, None if named is None else folder / _path(where, named)
        )
    except QueryError as error:
        raise InputError(f"{where}: {error}") from error


def _clips(where: str, folder: Path, value: object) -> list[str | Path]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{where}: examples are given as a path or a list of paths, not {value!r}")
    return [folder / _path(where, name) for name in names]


def _path(where: str, text: str) -> str:
    """A text that can be the name of a file."""
    try:
        possible = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise InputError(f"{where} names {text!r}, which no file can be called; correct it")
    return text
