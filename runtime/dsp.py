"""What the transforms are made of: the window, mel filters, pieces of signals, small matrix products."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Complex = NDArray[np.complex64]

AMIN = 1e-10  # smallest mel power, -100 dB
ONE_THREAD = 1 << 18  # multiplications in a product that OpenBLAS does not share out


@lru_cache(maxsize=8)
def hann(n: int) -> Float64:
    """Periodic Hann window, 0.5 - 0.5 cos(2 pi k / n)."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)


def cut(x: NDArray[np.floating], begin: int, out: NDArray[np.floating]) -> tuple[int, int]:
    """Copy samples [begin, begin + len(out)) of a signal, which they at least touch.

    Returns how many of `out` lie before and after the signal; those are left as they are.
    """
    left, right = max(-begin, 0), max(begin + len(out) - len(x), 0)
    out[left : len(out) - right] = x[begin + left : begin + len(out) - right]
    return left, right


def multiply_matrices(a: NDArray[Any], b: NDArray[Any], out: NDArray[Any]) -> None:
    """a @ b in pieces that a BLAS leaves to the thread that calls it.

    Waking its other threads takes longer than such products, and milliseconds where an inference engine keeps the cores busy.
    """
    rows = max(1, ONE_THREAD // b.size)
    for begin in range(0, len(a), rows):
        np.matmul(a[begin : begin + rows], b, out=out[begin : begin + rows])


def _slaney_mel(hz: Float64) -> Float64:
    """Slaney's mel scale: linear below 1 kHz, logarithmic above."""
    linear = hz * 3 / 200
    return np.where(hz < 1000, linear, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))


def _slaney_hz(mel: Float64) -> Float64:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((np.maximum(mel, 15) - 15) / 27))


@lru_cache(maxsize=8)
def mel_filterbank(sample_rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float) -> Float32:
    """Triangular filters on Slaney's mel scale with unit area (librosa's defaults): [n_fft / 2 + 1, n_mels]."""
    limits = _slaney_mel(np.array([fmin, fmax], np.float64))
    edges = _slaney_hz(np.linspace(limits[0], limits[1], n_mels + 2))
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])).astype(np.float32)
