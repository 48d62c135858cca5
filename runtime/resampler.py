"""The 2:3 resampler that the models were trained with."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .dsp import Float32, cut, multiply_matrices
from .scratch import Pool


@lru_cache(maxsize=4)
def resampling_kernel_2_3(width: int = 7, lowpass: int = 6, rolloff: float = 0.99) -> Float32:
    """Taps [3, 16] of the windowed-sinc 2:3 resampler.

    The phase term is float32 as in torchaudio, whose output the models were trained on; in float64 it is 1e-4 off.
    """
    base = 2 * rolloff
    phase = (np.arange(0, -3, -1) / 3).astype(np.float32)[:, None]
    t = np.clip((phase + np.arange(-width, width + 2)[None] / 2) * base, -lowpass, lowpass)
    taps = np.cos(np.pi * t / lowpass / 2) ** 2 * np.sinc(t) * base / 2
    return taps.astype(np.float32)


class _Resampling:
    """One block of the resampler: rows of 16 samples, each with the 14 samples around it that its 24 results also need."""

    ROWS = 1024

    def __init__(self) -> None:
        self.samples = np.empty(16 * self.ROWS + 14, np.float32)
        self.results = np.empty((self.ROWS, 24), np.float32)
        self._overlapping = as_strided(self.samples, (self.ROWS, 30), (64, 4), writeable=False)
        self._taps = np.zeros((30, 24), np.float32)
        for step in range(8):
            self._taps[2 * step : 2 * step + 16, 3 * step : 3 * step + 3] = resampling_kernel_2_3().T

    def run(self) -> None:
        for parity in (0, 1):  # a BLAS takes no rows that overlap, but every other one
            multiply_matrices(self._overlapping[parity::2], self._taps, self.results[parity::2])


_RESAMPLING = Pool(_Resampling)


def resample_2_3(x: Float32, out: Float32 | None = None) -> Float32:
    """Resample by 3/2 (32 to 48 kHz): [..., n] → [..., ceil(3 n / 2)] float32, written to `out` if given; samples outside are zero."""
    if out is None:
        out = np.empty((*x.shape[:-1], -(-3 * x.shape[-1] // 2)), np.float32)
    with _RESAMPLING.borrow() as block:
        for row in np.ndindex(x.shape[:-1]):
            for begin in range(0, out.shape[-1], block.results.size):
                left, right = cut(x[row], begin * 2 // 3 - 7, block.samples)
                block.samples[:left] = 0
                block.samples[len(block.samples) - right :] = 0
                block.run()
                piece = out[row][begin : begin + block.results.size]
                piece[:] = block.results.reshape(-1)[: len(piece)]
    return out
