"""Speech by espeak-ng. Voices and sentences of training and test are different ones."""

from __future__ import annotations

import io
import shutil
import subprocess

import numpy as np
import soundfile
import soxr

from .draw import Draw, Wave

ACCENTS = (["en-us", "en-gb", "en-gb-scotland", "en-gb-x-gbclan"], ["en-us", "en-gb", "en-gb-x-rp", "en-gb-x-gbcwmd"])
VARIANTS = (["m1", "m2", "m3", "m5", "m7", "f1", "f2", "f4", "croak"], ["m4", "m6", "f3", "f5"])
WHO = (
    [
        "the old captain",
        "my neighbour",
        "a young doctor",
        "every child",
        "the driver",
        "our teacher",
        "nobody",
        "the tall girl",
    ],
    ["the small boy", "her uncle", "a famous painter", "the new manager"],
)
DOES = (
    [
        "walked slowly to",
        "was talking about",
        "never liked",
        "sold",
        "wants to visit",
        "is looking for",
        "remembered",
        "carries",
    ],
    ["bought", "forgot to mention", "has often seen", "would rather leave"],
)
WHAT = (
    [
        "the station before noon",
        "seven wooden boxes",
        "the price of bread",
        "a garden full of apples",
        "yesterday's paper",
        "the winter coat",
    ],
    ["another bottle of milk", "the bridge near town", "nine letters this morning", "the quiet little house"],
)
JOIN = ([", and then", ", because", ", while"], [", but", ", although"])


def _phrase(draw: Draw) -> str:
    return " ".join(str(draw.random.choice(words[draw.test])) for words in (WHO, DOES, WHAT))


def speech(draw: Draw, n: int, rate: int) -> Wave:
    """Continuous talk, started at a random place.

    Raises:
        FileNotFoundError: espeak-ng is not installed.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise FileNotFoundError("espeak-ng is not installed; run: apt-get install espeak-ng")
    voice = f"{draw.random.choice(ACCENTS[draw.test])}+{draw.random.choice(VARIANTS[draw.test])}"
    text = str(draw.random.choice(JOIN[draw.test])).join(_phrase(draw) for _ in range(1 + n // (3 * rate)))
    speed, pitch = str(round(draw(130, 210))), str(round(draw(20, 75)))
    out = subprocess.run([program, "-v", voice, "-s", speed, "-p", pitch, "--stdout", text], capture_output=True, check=True).stdout
    x, source_rate = soundfile.read(io.BytesIO(out))
    x = soxr.resample(x, source_rate, rate)
    loud = np.flatnonzero(np.abs(x) > 0.02 * np.abs(x).max())
    x = x[loud[0] : loud[-1] + 1]
    return np.roll(np.tile(x, -(-n // len(x))), -draw.count(0, len(x) - 1))[:n]
