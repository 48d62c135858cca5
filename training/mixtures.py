"""What a mixture holds and what is asked of it: seeded choices, shared by training and by benchmarks/quality.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
KINDS = ("P", "N", "PN")
KIND_SHARES = (0.25, 0.25, 0.5)  # paper section IV: half of the training queries have both sides
SOURCE_SHARES = (0.6, 0.25, 0.15)  # of 2, 3 and 4 sources
ABSENT = 0.14  # share of queries that name a class that is not there; half of them have a silent target
TWO_TARGETS = 0.25  # share of mixtures of three or more in which two sources are wanted


@dataclass(frozen=True)
class Question:
    """Class names to extract and to remove (either may be empty), and the indices of the sources that the answer consists of."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    kept: tuple[int, ...]


def choose_sources(random: np.random.Generator, classes: Sequence[str]) -> tuple[str, ...]:
    """Two to four different classes."""
    count = 2 + int(random.choice(3, p=SOURCE_SHARES))
    return tuple(str(name) for name in random.choice(list(classes), count, replace=False))


def ask(
    random: np.random.Generator, present: Sequence[str], classes: Sequence[str], wanted: int | None = None, kind: str | None = None
) -> Question:
    """A question about a mixture of the classes `present`, whose first target is source number `wanted` unless it is a random one."""
    kind = kind or str(random.choice(KINDS, p=KIND_SHARES))
    order = list(random.permutation(len(present)))
    if wanted is not None:
        order = [wanted, *(i for i in order if i != wanted)]
    count = 2 if len(order) > 2 and random.random() < TWO_TARGETS else 1
    kept, others = order[:count], order[count:]
    absent = (str(random.choice([c for c in classes if c not in present])),) if random.random() < ABSENT else ()
    if kind == "P":
        return Question(absent or _names(present, kept), (), () if absent else tuple(kept))
    if kind == "N":
        return Question((), absent or _names(present, others), tuple(order) if absent else tuple(kept))
    told = others[: 1 + int(random.integers(len(others)))]
    if absent and random.random() < 0.6:
        return Question(absent, _names(present, told), ())
    return Question(_names(present, kept), absent or _names(present, told), tuple(kept))


def _names(present: Sequence[str], indices: Sequence[int]) -> tuple[str, ...]:
    return tuple(present[i] for i in indices)


def level(sources: Float32, decibels: NDArray[np.floating]) -> Float32:
    """Sources [k, n] brought to the given energies in dB."""
    energy = np.maximum(np.mean(np.square(sources, dtype=np.float64), axis=1), 1e-12)
    return (sources * np.sqrt(10 ** (np.asarray(decibels) / 10) / energy)[:, None]).astype(np.float32)


def at_snr(sources: Float32, kept: Sequence[int], snr: float) -> Float32:
    """Sources [k, n] of equal energy on each side, with the sum of the `kept` ones `snr` dB above the sum of the others."""
    sources = level(sources, np.zeros(len(sources)))
    mine = np.isin(np.arange(len(sources)), kept)
    ratio = np.sum(np.square(sources[mine].sum(0), dtype=np.float64)) / np.sum(np.square(sources[~mine].sum(0), dtype=np.float64))
    gain = np.where(mine, np.sqrt(10 ** (snr / 10) / ratio), 1.0)
    return (sources * gain[:, None]).astype(np.float32)


def fit_peak(sources: Float32, peak: float) -> Float32:
    """Sources scaled together so that their sum has the given peak."""
    return sources * np.float32(peak / max(float(np.abs(sources.sum(0)).max()), 1e-9))
