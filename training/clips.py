"""Random stretches of rendered clips, mixed as training wants them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .mixtures import Float32, fit_peak, level
from .sounds import CLASSES

EXCERPT = 0.25  # share of sources that begin or end inside the window
SHORT = 0.3  # share of query clips shorter than the window


class Clips:
    """A pool int16 [classes, clips, samples] and the windows that are cut from it."""

    def __init__(self, path: Path, window: int) -> None:
        self.data: NDArray[np.int16] = np.load(path, mmap_mode="r")
        self.window = window

    def cut(self, random: np.random.Generator, name: str, clip: int, size: int | None = None) -> Float32:
        """A random stretch of one clip; of three tries the loudest if the first is nearly silent."""
        x, size = self.data[CLASSES.index(name), clip], size or self.window
        best, loudness = np.zeros(size, np.float32), -1.0
        for _ in range(3):
            begin = int(random.integers(len(x) - size + 1))
            stretch = x[begin : begin + size].astype(np.float32) / np.float32(32767)
            energy = float(np.dot(stretch, stretch)) / size
            if energy > loudness:
                best, loudness = stretch, energy
            if energy > 1e-4:
                break
        return best

    def pick(self, random: np.random.Generator) -> int:
        return int(random.integers(self.data.shape[1]))

    def sources(self, random: np.random.Generator, names: tuple[str, ...], clips: list[int]) -> Float32:
        """One stretch per class [k, window], two of them -10 to 10 dB apart, more within ±7 dB, together within full scale."""
        parts = np.stack([self._excerpt(random, self.cut(random, name, clip)) for name, clip in zip(names, clips, strict=True)])
        levels = random.uniform(-10, 10) * np.arange(2) if len(names) == 2 else random.uniform(-7, 7, len(names))
        parts = level(parts, levels) * random.choice([-1, 1], (len(names), 1)).astype(np.float32)
        return fit_peak(parts, float(0.95 * 0.15 ** random.random()))

    def _excerpt(self, random: np.random.Generator, x: Float32) -> Float32:
        if random.random() < EXCERPT:
            cut, fade = int(random.uniform(0.1, 0.6) * len(x)), np.linspace(0, 1, 640, dtype=np.float32)
            gain = np.ones(len(x), np.float32)
            gain[:cut] = 0
            gain[cut : cut + 640] = fade
            x = x * (gain if random.random() < 0.5 else gain[::-1])
        return x

    def query(self, random: np.random.Generator, name: str, clip: int) -> Float32:
        """An example clip [window], some of them short ones repeated as the runtime repeats them."""
        size = int(self.window * random.uniform(0.3, 1)) if random.random() < SHORT else self.window
        x = self.cut(random, name, clip, size)
        out = np.zeros(self.window, np.float32)
        repeated = np.tile(x, self.window // size)
        out[: len(repeated)] = repeated
        return out * np.float32(0.95 * 0.1 ** random.random() / max(float(np.abs(x).max()), 1e-6))
