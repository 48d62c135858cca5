"""Test signals that gates, calibration and benchmarks share: the ordinary, and those on which engines break."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int16 = NDArray[np.int16]
HARD = ("silence", "full_scale_square", "clipped", "dc", "impulse", "white_noise")
CALIBRATION = ("speech", "tones", "noise", *HARD)  # on which activation ranges are measured


def _int16(x: NDArray[np.float64]) -> Int16:
    return np.round(np.clip(x, -1, 1) * 32767).astype(np.int16)


def speech_like(n: int, rate: int, seed: int) -> NDArray[np.float64]:
    """Harmonics of a wandering pitch, in syllables, over a noise floor: [n] within about ±0.6."""
    random = np.random.Generator(np.random.PCG64(seed))
    t = np.arange(n) / rate
    pitch = 140 + 40 * np.sin(2 * np.pi * 0.7 * t + random.uniform(0, 6)) + 15 * np.sin(2 * np.pi * 3.1 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voice = sum(np.sin(k * phase + random.uniform(0, 6)) / k for k in range(1, 24))
    syllables = np.clip(np.sin(2 * np.pi * 3.3 * t + random.uniform(0, 6)), 0, 1) ** 0.5
    return 0.25 * voice * syllables + 0.02 * random.standard_normal(n)


def chirps(n: int, rate: int) -> NDArray[np.float64]:
    """A siren: a tone that sweeps between 500 and 1500 Hz."""
    t = np.arange(n) / rate
    return 0.3 * np.sin(2 * np.pi * np.cumsum(1000 + 500 * np.sin(2 * np.pi * 0.5 * t)) / rate)


def mixture(n: int, rate: int) -> Int16:
    """The ordinary case: something like speech under a siren."""
    return _int16(speech_like(n, rate, 1) + chirps(n, rate))


def query(n: int, rate: int, seed: int) -> Int16:
    return _int16(speech_like(n, rate, seed) if seed % 2 else chirps(n, rate) * (0.5 + 0.5 * np.sin(np.arange(n) * seed * 3e-4)))


def named(name: str, n: int, rate: int) -> Int16:
    """One of `CALIBRATION`, [n]."""
    t = np.arange(n) / rate
    noise = np.random.Generator(np.random.PCG64(7)).uniform(-1, 1, n)
    impulse = np.zeros(n)
    impulse[n // 3] = 1
    made = {
        "speech": speech_like(n, rate, 2),
        "tones": chirps(n, rate) + 0.2 * np.sin(2 * np.pi * 440 * t) + 0.2 * np.sin(2 * np.pi * 6000 * t),
        "noise": 0.1 * noise,
        "silence": np.zeros(n),
        "full_scale_square": np.where(np.sin(2 * np.pi * 220 * t) >= 0, 1.0, -1.0),
        "clipped": 12 * speech_like(n, rate, 3),
        "dc": np.full(n, 0.5),
        "impulse": impulse,
        "white_noise": noise,
    }
    return _int16(made[name])
