"""Random parameters in two disjoint sets, one to train on and one to test on, and the parts that sounds are made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float64]
CELLS, EVERY, HELD_OUT = 20, 5, 2


class Draw:
    """A seeded source of parameters.

    Every range is cut into 20 cells (evenly on a logarithmic scale). Cells 2, 7, 12 and 17 belong to the tests and are never
    drawn in training, so a test sound has no pitch, rate or decay that a training sound had.
    """

    def __init__(self, random: np.random.Generator, test: bool) -> None:
        self.random, self.test = random, test
        self.cells = [i for i in range(CELLS) if (i % EVERY == HELD_OUT) == test]

    def __call__(self, low: float, high: float) -> float:
        """A parameter between two positive limits."""
        u = (self.random.choice(self.cells) + self.random.random()) / CELLS
        return float(low * (high / low) ** u)

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def count(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return int(self.random.integers(low, high + 1))

    def pick(self, items: list[float]) -> float:
        return items[int(self.random.integers(len(items)))]


def seconds(n: int, rate: int) -> Wave:
    return np.arange(n) / rate


def tone(frequency: Wave | float, n: int, rate: int, partials: list[float], phase: float = 0.0) -> Wave:
    """Harmonics 1, 2, … with the amplitudes `partials` over a frequency that may move; those above 15 kHz are left out."""
    track = np.broadcast_to(frequency, n)
    angle = 2 * np.pi * np.cumsum(track) / rate + phase
    top = float(np.max(track)) if n else 0.0
    total = np.zeros(n)
    for k, amplitude in enumerate(partials, 1):
        if amplitude and k * top < 15000:
            total += amplitude * np.sin(k * angle)
    return total


def decay(n: int, rate: int, length: float, attack: float = 0.002) -> Wave:
    """Fast rise, exponential fall with the given time constant in seconds."""
    t = seconds(n, rate)
    return np.minimum(t / attack, 1) * np.exp(-t / length)


def gate(n: int, rate: int, edge: float = 0.008) -> Wave:
    """1 with raised edges of `edge` seconds."""
    size = min(max(int(edge * rate), 1), max(n // 2, 1))
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(size) + 0.5) / size)
    shape = np.ones(n)
    shape[:size], shape[n - size :] = ramp[: min(size, n)], ramp[::-1][: min(size, n)]
    return shape


def noise(draw: Draw, n: int, rate: int, curve: Callable[[Wave], Wave]) -> Wave:
    """Gaussian noise whose amplitude spectrum follows `curve` of the frequency in Hz, at rms 1."""
    bins = n // 2 + 1
    spectrum = draw.random.standard_normal(bins) + 1j * draw.random.standard_normal(bins)
    x = np.fft.irfft(spectrum * curve(np.fft.rfftfreq(n, 1 / rate)), n)
    return x / max(float(np.sqrt(np.mean(x**2))), 1e-12)


def band(low: float, high: float, slope: float = 2.0) -> Callable[[Wave], Wave]:
    """Band-pass of the given order for `noise`."""
    return lambda f: 1 / np.sqrt((1 + (low / np.maximum(f, 1)) ** (2 * slope)) * (1 + (f / high) ** (2 * slope)))


def wander(draw: Draw, n: int, rate: int, hertz: float) -> Wave:
    """A slow random curve of rms 1 with frequencies up to `hertz`."""
    points = max(int(n / rate * hertz * 2) + 3, 4)
    return np.interp(np.linspace(0, points - 1, n), np.arange(points), draw.random.standard_normal(points))


def place(out: Wave, x: Wave, start: float) -> None:
    """Add `x` into `out` from sample `start` on; what sticks out is cut."""
    begin = int(start)
    first, last = max(begin, 0), min(begin + len(x), len(out))
    if last > first:
        out[first:last] += x[first - begin : last - begin]
