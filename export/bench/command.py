"""What `clapsep-export bench` does with its arguments."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from ...runtime.errors import InputError, OutputError, OutputExists
from ...runtime.outputs import new_file
from . import GROUPS
from .cases import Sweeps
from .compare import compare, comparison_table, differences, require
from .lab import Variant
from .page import page
from .plots import load_matplotlib
from .result import Result, read_result
from .rounds import Budget
from .run import Settings, measure
from .statistics import warnings
from .table import table

log = logging.getLogger(__name__)
QUICK = Budget(0.0, 2)


@dataclass(frozen=True)
class Request:
    """The command's arguments."""

    bundle: Path | None
    engines: tuple[str, ...]
    device: str | None
    precision: str | None
    seconds: float
    quick: bool
    only: tuple[str, ...]
    queries: tuple[int, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    callers: tuple[int, ...]
    json_out: Path | None
    html_out: Path | None
    source: Path | None
    old: Path | None
    margin: float
    force: bool

    def measures(self) -> bool:
        """Whether anything says how to measure."""
        sweeps = self.queries or self.batches or self.threads or self.callers
        return bool(self.engines or self.device or self.precision or self.quick or self.only or sweeps)

    def settings(self) -> Settings:
        """What to measure."""
        variants = (Variant.parse(engine, self.device, self.precision) for engine in self.engines or ("onnxruntime",))
        usual = Sweeps()
        sweeps = Sweeps(
            _distinct(self.queries) or usual.queries,
            _distinct(self.batches) or usual.batches,
            _distinct(self.threads) or usual.threads,
            _distinct(self.callers) or usual.callers,
            10 if self.quick else usual.seconds,
        )
        budget = QUICK if self.quick else Budget(self.seconds, 5)
        only = tuple(group for group in GROUPS if group in self.only)
        return Settings(tuple(dict.fromkeys(variants)), sweeps, budget, 2 if self.quick else 5, only)


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))


def run(request: Request, command: str, progress: Callable[[str], None]) -> None:
    """Measure, or read what was measured; then write, show and compare.

    Raises:
        ClapsepError: above all RegressionError, after everything has been written and shown.
    """
    if (request.bundle is None) == (request.source is None):
        raise InputError("give a bundle to measure, or an earlier benchmark with --from, and not both")
    if request.source is not None and request.measures():
        raise InputError("with --from nothing is measured; leave out what says how to measure")
    old = None if request.old is None else read_result(request.old)
    result = None if request.source is None else read_result(request.source)
    _check_outputs(request)
    if result is None and request.bundle is not None:
        result = measure(request.bundle, request.settings(), command, progress)
    assert result is not None
    click.echo(table(result))
    _write(request, result)
    for warning in warnings(result):
        log.warning("%s", warning)
    if old is not None and request.old is not None:
        _compare(result, old, request.old, request.margin)


def _check_outputs(request: Request) -> None:
    """Whatever would stop the outputs is said before anything long begins."""
    outputs = [path for path in (request.json_out, request.html_out) if path is not None]
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise InputError("--json and --html name the same file; give two names")
    for path in outputs:
        if path.is_dir() or (path.exists() and not request.force):
            raise OutputExists(f"{path} exists; choose another name{'' if path.is_dir() else ' or pass --force'}")
        if not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written, as {path.parent} is no directory; make it, or choose another place")
        if not os.access(path.parent, os.W_OK):
            raise OutputError(f"{path} cannot be written, as {path.parent} is not writable; choose another place")
    if request.html_out is not None:
        load_matplotlib()


def _write(request: Request, result: Result) -> None:
    html = page(result) if request.html_out is not None else ""
    for path, text in ((request.json_out, result.to_json()), (request.html_out, html)):
        if path is not None:
            with new_file(path, force=request.force) as file:
                file.write(text.encode())


def _compare(result: Result, old: Result, where: Path, margin: float) -> None:
    changes = compare(result, old, where)
    click.echo(f"\nagainst {where}, taken {old.taken}:\n{comparison_table(changes, margin)}")
    for difference in differences(result, old):
        log.warning("%s", difference)
    require(changes, margin, where)
