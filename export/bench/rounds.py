"""Timing by turns: what is to be compared is measured in the same rounds, so that noise hits all of it alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .result import Case, Parameters, Reading

REFERENCE_SHAPE = (256, 48, 48)  # products so small that BLAS uses one thread: how fast a core is, not how fast threads wake up
REFERENCE_EVERY = 0.25  # seconds
REFERENCE_FIRST = 20  # readings before anything else
SHORT = 1e-3  # seconds; what is faster is called several times for one observation
MOST_CALLS = 1000
MOST_ROUNDS = 300


@dataclass(frozen=True)
class Probe:
    """Something to time; the other fields are those of `Case`."""

    name: str
    engine: str
    call: Callable[[], object]
    parameters: Parameters = field(default_factory=dict)
    audio_seconds: float = 0.0


@dataclass(frozen=True)
class Budget:
    """Seconds for each probe, and the rounds that it gets however long they take."""

    seconds: float
    rounds: int


class Stopwatch:
    """Times probes by turns, and again and again the reference, fixed products of small matrices that show the machine's state."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._matrices = np.random.default_rng(0).standard_normal(REFERENCE_SHAPE).astype(np.float32)
        self.reference: list[Reading] = []
        self._products = np.empty_like(self._matrices)
        for _ in range(REFERENCE_FIRST):
            self.refer()

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._start

    def refer(self) -> None:
        """Take a reading of the reference, once its matrices are in the cache again."""
        at = self.now()
        self._product()
        self.reference.append(Reading(round(at, 6), round(timed(self._product), 9)))

    def _product(self) -> object:
        return np.matmul(self._matrices, self._matrices, out=self._products)

    def measure(self, probes: Sequence[Probe], budget: Budget) -> list[Case]:
        """All probes once in each round, after calls that are not counted, until their time together is used up."""
        calls = [_calls(probe) for probe in probes]
        seconds: list[list[float]] = [[] for _ in probes]
        begin = self.now()
        self.refer()
        rounds = 0
        while rounds < budget.rounds or (rounds < MOST_ROUNDS and self.now() - begin < budget.seconds * len(probes)):
            self._round(probes, calls, seconds)
            rounds += 1
        self.refer()
        times = round(begin, 6), round(self.now(), 6)
        return [_case(*one, *times) for one in zip(probes, calls, seconds, strict=True)]

    def _round(self, probes: Sequence[Probe], calls: Sequence[int], seconds: list[list[float]]) -> None:
        for probe, count, observed in zip(probes, calls, seconds, strict=True):
            if self.now() - self.reference[-1].at > REFERENCE_EVERY:
                self.refer()
            observed.append(timed(probe.call, count))


def timed(call: Callable[[], object], count: int = 1) -> float:
    """Seconds of one of `count` consecutive calls."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _calls(probe: Probe) -> int:
    """Warm up, and see how many calls make an observation that the clock can tell."""
    first = timed(probe.call)
    usual = timed(probe.call) if first < 50 * SHORT else first
    return min(max(math.ceil(SHORT / max(usual, 1e-9)), 1), MOST_CALLS)


def _case(probe: Probe, calls: int, seconds: list[float], begin: float, end: float) -> Case:
    observations = tuple(max(round(value, 9), 1e-9) for value in seconds)
    return Case(probe.name, probe.engine, "s", probe.parameters, float(probe.audio_seconds), calls, begin, end, observations)
