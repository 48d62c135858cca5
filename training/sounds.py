"""The sound classes, and how one clip is made."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .draw import Draw, Wave
from .noisy import dog, drums, engine, fire, knocking, rain, thunder, wind
from .speech import speech
from .tonal import alarm, bell, birds, crickets, flute, guitar, organ, siren, telephone

RATE = 32000
SOUNDS: dict[str, Callable[[Draw, int, int], Wave]] = {
    f.__name__: f
    for f in (
        speech, siren, alarm, bell, engine, rain, wind, thunder, birds,
        dog, knocking, guitar, organ, flute, drums, fire, telephone, crickets,
    )
}  # fmt: skip
CLASSES = tuple(SOUNDS)
PEAK = 0.9


def render(name: str, seed: int, n: int, *, test: bool, rate: int = RATE) -> NDArray[np.float32]:
    """One clip of a class, `n` samples with peak 0.9; the same arguments always give the same clip."""
    random = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode()), int(test)]))
    x = SOUNDS[name](Draw(random, test), n, rate)
    x = x - x.mean()
    return (x * (PEAK / max(float(np.abs(x).max()), 1e-9))).astype(np.float32)
