"""Separation and parity metrics in decibels. Gates, benchmarks and tests take them from here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CEILING_DB = 300.0  # reported for identical signals, so that results stay finite in JSON


def _db(signal: float, noise: float) -> float:
    if noise <= 0:
        return CEILING_DB
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -CEILING_DB, CEILING_DB))


def snr(reference: Array, estimate: Array) -> float:
    """10 log10(|reference|² / |reference - estimate|²) over all elements, in dB (the paper's SDR, Eq. 15)."""
    r, e = np.asarray(reference, np.float64), np.asarray(estimate, np.float64)
    return _db(float(np.sum(r**2)), float(np.sum((r - e) ** 2)))


def si_sdr(reference: Array, estimate: Array) -> float:
    """SNR after projecting the estimate on the reference: scale-invariant SDR in dB (the paper's Eq. 16)."""
    r, e = (np.asarray(a, np.float64).ravel() for a in (reference, estimate))
    target = r * (np.dot(r, e) / max(float(np.dot(r, r)), 1e-300))
    return _db(float(np.sum(target**2)), float(np.sum((target - e) ** 2)))


def snr_improvement(reference: Array, estimate: Array, mixture: Array) -> float:
    """SDRi in dB: the SDR of the estimate less that of the untouched mixture (the paper's Eq. 17)."""
    return snr(reference, estimate) - snr(reference, mixture)


def si_sdr_improvement(reference: Array, estimate: Array, mixture: Array) -> float:
    """SI-SDRi in dB: the SI-SDR of the estimate less that of the untouched mixture (the paper's Eq. 18)."""
    return si_sdr(reference, estimate) - si_sdr(reference, mixture)


def cosine(a: Array, b: Array) -> Array:
    """Cosine of the vectors along the last axis; of an extracted sound's embedding and its query's, CLAPScore."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.sum(a * b, -1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-300)
