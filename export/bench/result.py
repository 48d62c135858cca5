"""A benchmark as JSON: what was measured, on what, and every raw observation. `docs/bench.md` describes the fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import InputError, ManifestError
from ...runtime.manifest import decode

FORMAT = "clapsep-bench"
SCHEMA_VERSION = 1
UNITS = ("s", "bytes")
NUMPY = "numpy"  # in place of an engine, for what runs in none
SIZE_LIMIT = 64 << 20  # bytes of a JSON file; a real one has some hundred kilobytes
SMALLEST, LARGEST = 1e-12, 1e15  # of an observation

Parameters = dict[str, int | str]
Key = tuple[str, str, tuple[tuple[str, int | str], ...]]


@dataclass(frozen=True)
class Case:
    """One thing measured with one engine (`numpy` for what runs in no engine).

    observations: in `unit`, each the mean of `calls` consecutive calls, in the order of the rounds.
    audio_seconds: of target audio that one call makes, or of audio that it takes in where it makes none; 0 where neither says anything.
    begin, end: seconds since the run began.
    """

    name: str
    engine: str
    unit: str
    parameters: Parameters
    audio_seconds: float
    calls: int
    begin: float
    end: float
    observations: tuple[float, ...]

    @property
    def key(self) -> Key:
        """What makes it the same case in another run."""
        return self.name, self.engine, tuple(sorted(self.parameters.items()))

    @property
    def label(self) -> str:
        """Name and parameters: `separate, route split`."""
        return ", ".join([self.name, *(f"{name} {value}" for name, value in self.parameters.items())])


@dataclass(frozen=True)
class Reading:
    """How long the reference, fixed products of small matrices, took `at` seconds after the run began."""

    at: float
    seconds: float


@dataclass(frozen=True)
class Cpu:
    """Model, instruction set flags, physical cores, logical processors that this process may use, and what may slow them."""

    model: str
    flags: tuple[str, ...]
    cores: int
    usable: int
    governor: str
    quota: str


@dataclass(frozen=True)
class Environment:
    """Machine and software. `variables` are those that set numbers of threads or choose a GPU; `load` is the average of the last minute."""

    python: str
    platform: str
    cpu: Cpu
    memory: int
    load: float
    gpus: tuple[str, ...]
    driver: str
    packages: dict[str, str]
    blas: str
    variables: dict[str, str]


@dataclass(frozen=True)
class Subject:
    """The bundle that was measured; `sha256` is its manifest's, which vouches for everything else."""

    name: str
    sha256: str
    family: str
    weights: str
    precision: str


@dataclass(frozen=True)
class Result:
    """One run.

    notes: what was left out and why. elsewhere: cores that other programs kept busy meanwhile, on average; None where nobody can tell.
    """

    taken: str
    command: str
    environment: Environment
    bundle: Subject
    settings: dict[str, str]
    notes: tuple[str, ...]
    elsewhere: float | None
    reference: tuple[Reading, ...]
    cases: tuple[Case, ...]
    format: str = FORMAT
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def printable(text: str) -> str:
    """Text without what no terminal and no page should be given."""
    return "".join(c if c.isprintable() else "?" for c in text)


def read_result(path: Path) -> Result:
    """Read what `bench --json` wrote.

    Raises:
        InputError: not there, not a benchmark, of another schema, or with values that no benchmark has.
    """
    try:
        return _parse(_text(path))
    except RecursionError as error:
        raise _refusal(path, "it is nested too deeply") from error
    except (ValueError, OverflowError) as error:
        raise _refusal(path, str(error)) from error
    except ManifestError as error:
        raise _refusal(path, str(error).rsplit("; ", 1)[0]) from error


def _refusal(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is no benchmark that this version reads ({reason}); give a file that clapsep-export bench --json wrote")


def _text(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"{path} is not a file; give one that clapsep-export bench --json wrote")
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise ValueError(f"it is larger than {SIZE_LIMIT >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _parse(text: bytes) -> Result:
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'its "format" is not "{FORMAT}"')
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"its schema version is not {SCHEMA_VERSION}")
    if not all(text.isprintable() for text in _strings(data)):
        raise ValueError("it has text that cannot be printed")
    result = decode(Result, data, "the file")
    _require(_moment(result.environment.memory), "size of memory")
    _require(result.elsewhere is None or _moment(result.elsewhere), "account of other programs")
    _require(bool(result.reference) and all(_measured([r.seconds]) and _moment(r.at) for r in result.reference), "reference")
    for case in result.cases:
        _check(case)
    _require(len({case.key for case in result.cases}) == len(result.cases) > 0, "list of cases")
    return result


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _check(case: Case) -> None:
    named = bool(case.name and case.engine) and case.unit in UNITS
    named = named and all(isinstance(value, str) or abs(value) <= LARGEST for value in case.parameters.values())
    timed = _moment(case.audio_seconds) and _moment(case.begin) and _moment(case.end) and case.calls > 0
    _require(named and timed and bool(case.observations) and _measured(case.observations), f"case {case.label[:80]!r}")


def _measured(values: Iterable[float]) -> bool:
    return all(SMALLEST <= value <= LARGEST for value in values)


def _moment(value: float) -> bool:
    return 0 <= value <= LARGEST


def _require(fine: bool, what: str) -> None:
    if not fine:
        raise ValueError(f"its {what} cannot have been measured")
