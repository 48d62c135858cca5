"""One run of the benchmark: every group of cases, with what must be known to judge them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ...runtime.bundle import Bundle
from ...runtime.errors import InputError
from . import GROUPS
from .cases import PROBES, Sweeps
from .environment import Neighbours, look_around, subject
from .lab import Lab, Sharing, Variant
from .result import Case, Result, printable
from .rounds import Budget, Stopwatch
from .starts import measure_starts


@dataclass(frozen=True)
class Settings:
    """What to measure, by which engines, for how long; `starts` are fresh processes, `only` names groups (all by default)."""

    variants: tuple[Variant, ...]
    sweeps: Sweeps
    budget: Budget
    starts: int
    only: tuple[str, ...]

    def recorded(self) -> dict[str, str]:
        """As the result keeps it."""
        return {
            "seconds per case": f"{self.budget.seconds:g}",
            "rounds at least": str(self.budget.rounds),
            "fresh processes": str(self.starts),
            "groups": ", ".join(self.only or GROUPS),
            "engine threads": "one per physical core, but where a case says otherwise",
        }


def measure(path: Path, settings: Settings, command: str, progress: Callable[[str], None]) -> Result:
    """Run the benchmark on the bundle at `path`.

    Raises:
        BundleError, EngineUnavailable, EngineError
    """
    bundle = Bundle.open(path)
    for variant in settings.variants:  # what cannot run is said before anything long begins
        variant.check(bundle)
    environment, taken = look_around(), datetime.now(UTC).isoformat(timespec="seconds")
    progress("checking files")
    bundle.check_files()
    lab, neighbours, stopwatch = Lab(bundle, settings.variants), Neighbours(), Stopwatch()
    cases = [case for group in settings.only or GROUPS for case in _group(group, lab, settings, stopwatch, progress)]
    if not cases:
        raise InputError(f"nothing can be measured of {', '.join(settings.only)} with these engines; name other groups, or none")
    measured = neighbours(), tuple(stopwatch.reference), tuple(cases)
    described = taken, printable(command), environment, subject(bundle), settings.recorded(), tuple(_notes(lab, settings))
    return Result(*described, *measured)


def _group(name: str, lab: Lab, settings: Settings, stopwatch: Stopwatch, progress: Callable[[str], None]) -> list[Case]:
    progress(name)
    if name == "starts":
        return measure_starts(lab, settings.starts, stopwatch)
    try:
        return stopwatch.measure(list(PROBES[name](lab, settings.sweeps)), settings.budget)
    finally:
        Sharing.forget()


def _notes(lab: Lab, settings: Settings) -> Iterator[str]:
    """What was not measured, and why."""
    if lab.bundle.manifest.tokenizer is None:
        yield "text queries were not measured, as the bundle has no tokenizer"
    for variant in settings.variants:
        if variant.on_gpu:
            yield f"threads of {variant.kind} were not varied, as it runs on the GPU"
        else:
            yield f"memory on a GPU was not measured for {variant.kind}, as it runs on the CPU"
    yield "cold starts read files that the system has in its page cache"
