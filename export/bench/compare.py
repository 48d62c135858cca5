"""A benchmark against an earlier one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...runtime.errors import InputError, RegressionError
from .result import Case, Result
from .statistics import quantile, warnings
from .table import aligned, quantity

HEADER = ("case", "engine", "old p50", "new p50", "new/old", "")


@dataclass(frozen=True)
class Change:
    """Medians of one case in both runs and the ratio of their tenth percentiles, with the old run's name, engine and parameters."""

    case: Case
    old: float
    new: float
    low_ratio: float

    @property
    def ratio(self) -> float:
        return self.new / self.old

    def worse(self, margin: float) -> bool:
        """Whether it is slower, or larger, by more than the margin: also at its best, as neighbours raise medians and code raises both."""
        return min(self.ratio, self.low_ratio) > margin

    def verdict(self, margin: float) -> str:
        """A word for what lies outside the margin."""
        words = {"s": ("slower", "faster"), "bytes": ("larger", "smaller")}[self.case.unit]
        return words[0] if self.worse(margin) else words[1] if max(self.ratio, self.low_ratio) < 1 / margin else ""


def compare(new: Result, old: Result, where: Path) -> tuple[Change, ...]:
    """Every case that both runs have; `where` names the old one in errors.

    Raises:
        InputError: there is none.
    """
    earlier = {(case.key, case.unit): case for case in old.cases}
    pairs = [(case, earlier[case.key, case.unit]) for case in new.cases if (case.key, case.unit) in earlier]
    if not pairs:
        raise InputError(f"{where} has no case in common with this run; give a benchmark with the same engines and settings")
    return tuple(_change(case, before) for case, before in pairs)


def _change(case: Case, before: Case) -> Change:
    (old, old_low), (new, new_low) = ([quantile(c.observations, q) for q in (0.5, 0.1)] for c in (before, case))
    return Change(case, old, new, new_low / old_low)


def comparison_table(changes: tuple[Change, ...], margin: float) -> str:
    """One line for each case, and the margin."""
    rows = [_row(change, margin) for change in changes]
    rule = f"margin {margin:g}: what takes more than {margin:g} times as much, at the median and at its best (p10), is a regression"
    return f"{aligned(HEADER, rows)}\n{rule}"


def _row(change: Change, margin: float) -> tuple[str, ...]:
    medians = (quantity(value, change.case.unit) for value in (change.old, change.new))
    return (change.case.label, change.case.engine, *medians, f"{change.ratio:.3f}", change.verdict(margin))


def require(changes: tuple[Change, ...], margin: float, where: Path) -> None:
    """Raise RegressionError if any case got worse by more than the margin."""
    bad = sorted((change for change in changes if change.worse(margin)), key=lambda change: -change.ratio)
    if bad:
        case, ratio = bad[0].case, bad[0].ratio
        raise RegressionError(
            f"{len(bad)} of {len(changes)} cases take more than {margin:g} times as much as in {where}, most of all '{case.label}' with "
            f"{case.engine} ({ratio:.2f} times); measure both versions again on a quiet machine, or find what changed"
        )


def differences(new: Result, old: Result) -> Iterator[str]:
    """What differs besides the code, so that a ratio may say nothing about the code: sentences. Nothing is corrected for it."""
    a, b = new.environment, old.environment
    if (a.cpu, a.memory, a.gpus) != (b.cpu, b.memory, b.gpus):
        yield f"the old run is from another machine ({b.cpu.model}, {b.cpu.cores} cores); ratios across machines say nothing about the code"
    if new.bundle.sha256 != old.bundle.sha256:
        yield f"the old run is of another bundle ({old.bundle.name}, manifest {old.bundle.sha256[:12]}…)"
    packages = ({**e.packages, "python": e.python, "blas": e.blas} for e in (a, b))
    if changed := ", ".join(_changed(*packages)):
        yield f"versions differ (old → new): {changed}"
    variables = ({**e.variables, "driver": e.driver} for e in (a, b))
    if changed := ", ".join(_changed(*variables)):
        yield f"the environment differs (old → new): {changed}"
    keys = {case.key for case in new.cases} ^ {case.key for case in old.cases}
    if keys:
        yield f"{len(keys)} cases are in one run only and were not compared"
    for warning in warnings(old):
        yield f"of the old run: {warning}"


def _changed(new: dict[str, str], old: dict[str, str]) -> Iterator[str]:
    for name in sorted({*new, *old}):
        if new.get(name) != old.get(name):
            yield f"{name} {old.get(name, 'absent')} → {new.get(name, 'absent')}"
