"""Sound as arrays: what is accepted, channel layout, levels."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dsp import Float32
from .errors import AudioError

MAX_CHANNELS = 64
LOUDEST = 1e12
HEADROOM = 0.9  # peaks above 1 are brought here before separation, and back after it


def check_rate(sample_rate: int, what: str) -> int:
    """A sample rate as an int; raises AudioError if it is none, or impossible."""
    try:
        rate = operator.index(sample_rate)
    except TypeError as error:
        raise AudioError(f"{what} has a sample rate of {sample_rate!r}; pass an integer in Hz") from error
    if not 1 <= rate <= 1_000_000:
        raise AudioError(f"{what} has a sample rate of {rate} Hz; pass a rate from 1 to 1000000 Hz")
    return rate


def check_samples(samples: NDArray[Any], what: str) -> Float32:
    """Samples as finite float32 [n] or [channels, n]; integers are scaled by their full range.

    Raises:
        AudioError: not numbers, wrong rank, no samples, too many channels, NaN or infinite samples.
    """
    try:
        array = np.asarray(samples)
    except ValueError as error:
        raise AudioError(f"{what} is no array of samples ({error}); pass [n] or [channels, n]") from error
    if array.ndim not in (1, 2):
        raise AudioError(f"{what} has {array.ndim} axes; pass samples as [n] or [channels, n]")
    if array.size == 0:
        raise AudioError(f"{what} has no samples; pass at least one")
    if array.ndim == 2 and len(array) > MAX_CHANNELS:
        raise AudioError(f"{what} has {len(array)} channels; transpose [n, channels] to [channels, n] (at most {MAX_CHANNELS})")
    if array.dtype.kind == "i":
        array = array / -float(np.iinfo(array.dtype).min)
    elif array.dtype.kind != "f":
        raise AudioError(f"{what} has samples of type {array.dtype}; pass float or signed integer samples")
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused in the next line
        array = array.astype(np.float32)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise AudioError(f"{what} has {bad} NaN or infinite samples; repair the recording first")
    check_peak(peak_of(array), what)
    return array


def check_peak(peak: float, what: str) -> None:
    """Raises AudioError if squares of samples would not stay finite."""
    if peak > LOUDEST:
        raise AudioError(f"{what} has samples as large as {peak:.3g}, which is no sound; check its format")


def to_mono(samples: Float32) -> Float32:
    """Mean of the channels: [n] or [channels, n] → [n]."""
    return samples if samples.ndim == 1 else samples.mean(0, dtype=np.float32)


def headroom_gain(peak: float) -> float:
    """The factor that brings a peak above 1 to 0.9; 1 for everything else."""
    return HEADROOM / peak if peak > 1 else 1.0


def peak_of(samples: Float32) -> float:
    """Largest magnitude of at least one sample."""
    return max(float(samples.max()), -float(samples.min()))
