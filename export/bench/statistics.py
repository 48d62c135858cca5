"""Statistics of a benchmark's observations, and which of them may be quoted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .result import Case, Result

NOISY = 1.2  # p90 / p10 of what may be quoted at most, and how much slower the reference may be than at its best
NEIGHBOURS = 0.2  # cores that other programs may keep busy
FEWEST = 5  # observations of what may be quoted


@dataclass(frozen=True)
class Summary:
    """Of one case; None where there are too few observations, or no audio.

    spread: p90 / p10. throughput: seconds of audio in a second. rtf: seconds for a second of audio.
    doubts: why the case must not be quoted: `few` observations, `spread`, or `machine`, whose speed changed. Empty if it may be.
    """

    case: Case
    p50: float
    p90: float | None
    p99: float | None
    spread: float
    throughput: float | None
    rtf: float | None
    doubts: tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    """An engine against the first one, observation by observation of the same rounds: median and the middle 80 %."""

    case: Case
    first: str
    p50: float
    p10: float
    p90: float


def quantile(values: Sequence[float], q: float) -> float:
    """Quantile with linear interpolation."""
    return float(np.quantile(np.asarray(values, np.float64), q))


def spread(values: Sequence[float]) -> float:
    """p90 / p10."""
    return quantile(values, 0.9) / quantile(values, 0.1)


def _known(values: Sequence[float], q: float) -> float | None:
    """A quantile, if at least one observation in the mean lies beyond it."""
    return quantile(values, q) if len(values) * (1 - q) >= 1 - 1e-9 else None


def summarize(result: Result) -> tuple[Summary, ...]:
    """One summary for each case, in their order."""
    best = quantile([reading.seconds for reading in result.reference], 0.1)
    return tuple(_summary(case, _readings(result, case), best) for case in result.cases)


def _summary(case: Case, readings: Sequence[float], best: float) -> Summary:
    values, audio = case.observations, case.audio_seconds
    p50 = quantile(values, 0.5)
    shown = (p50, _known(values, 0.9), _known(values, 0.99), spread(values))
    return Summary(case, *shown, audio / p50 if audio else None, p50 / audio if audio else None, tuple(_doubts(case, readings, best)))


def _readings(result: Result, case: Case) -> list[float]:
    """Readings of the reference while a case was measured."""
    return [reading.seconds for reading in result.reference if case.begin <= reading.at <= case.end]


def _doubts(case: Case, readings: Sequence[float], best: float) -> Iterator[str]:
    if len(case.observations) < FEWEST:
        yield "few"
    if spread(case.observations) > NOISY:
        yield "spread"
    timed = case.unit == "s"  # memory does not depend on the machine's speed
    if timed and readings and (spread(readings) > NOISY or quantile(readings, 0.5) > NOISY * best):
        yield "machine"


def warnings(result: Result) -> tuple[str, ...]:
    """Why figures of this run, or some of them, must not be quoted: sentences."""
    return tuple(_warnings(result, summarize(result)))


def _warnings(result: Result, summaries: Sequence[Summary]) -> Iterator[str]:
    seconds = [reading.seconds for reading in result.reference]
    if spread(seconds) > NOISY:
        low, high = (f"{1000 * quantile(seconds, q):.3g} ms" for q in (0.1, 0.9))
        yield (
            f"too noisy to quote: the machine's speed changed during the run (the reference took {low} to {high}, p90/p10 "
            f"{spread(seconds):.2f}, at most {NOISY} is allowed); run it again when nothing else runs"
        )
    if result.elsewhere is not None and result.elsewhere > NEIGHBOURS:
        yield (
            f"too noisy to quote: other programs kept {result.elsewhere:.2f} cores busy meanwhile, at most {NEIGHBOURS} is allowed; "
            "run it again when nothing else runs"
        )
    doubtful = [summary for summary in summaries if summary.doubts]
    if doubtful:
        counts = ", ".join(f"{word} {sum(word in s.doubts for s in doubtful)}" for word in ("spread", "machine", "few"))
        yield f"{len(doubtful)} of {len(summaries)} cases must not be quoted ({counts}); they are marked, docs/bench.md says by which rule"


def ratios(result: Result) -> tuple[Ratio, ...]:
    """Each case of each further engine against the first engine that has it."""
    first: dict[object, Case] = {}
    found = []
    for case in result.cases:
        other = first.setdefault((case.name, case.unit, tuple(sorted(case.parameters.items()))), case)
        if other is not case and len(other.observations) == len(case.observations):
            quotients = [a / b for a, b in zip(case.observations, other.observations, strict=True)]
            found.append(Ratio(case, other.engine, quantile(quotients, 0.5), quantile(quotients, 0.1), quantile(quotients, 0.9)))
    return tuple(found)
