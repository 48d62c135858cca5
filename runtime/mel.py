"""Log-mel spectra, computed next to the transform while its blocks are in the processor's cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dsp import AMIN, Complex, Float32, multiply_matrices
from .scratch import Pool
from .stft import Real, Stft

WIDTH = 16  # neighbouring mels whose filters share few enough bins to be one small product


class Band(NamedTuple):
    """Neighbouring mels, the bins under their filters, and the filters [bins, mels]."""

    bins: slice
    mels: slice
    filters: Float32


@dataclass(frozen=True, eq=False)
class LogMel:
    """Log-mel spectrum in dB, 10 log10(max(mel power, 1e-10)), with filters [bins, n_mels]."""

    stft: Stft
    filterbank: Float32

    def __call__(self, x: Real, out: Float32 | None = None) -> Float32:
        """[..., samples] → [..., frames, n_mels], written to `out` if given."""
        if out is None:
            out = np.empty((*x.shape[:-1], self.stft.frames(x.shape[-1]), self.filterbank.shape[1]), np.float32)
        with self._scratch.borrow() as (spectrum, power):
            for row in np.ndindex(x.shape[:-1]):
                for rows, block in self.stft.blocks(x[row]):
                    n = len(block)
                    self._mel(block, spectrum[:n], power[:n], out[row][rows])
        np.maximum(out, np.float32(AMIN), out=out)
        np.log10(out, out=out, dtype=np.float64, casting="same_kind")  # so that silence is exactly -100 dB
        out *= 10
        return out

    def _mel(self, block: NDArray[np.complex128], spectrum: Complex, power: Float32, out: Float32) -> None:
        """Mel power of one block."""
        spectrum[:] = block[:, : spectrum.shape[1]]
        np.abs(spectrum, out=power)
        np.square(power, out=power)
        for bins, mels, filters in self._bands:
            multiply_matrices(power[:, bins], filters, out[:, mels])

    @cached_property
    def _bands(self) -> list[Band]:
        starts = range(0, self.filterbank.shape[1], WIDTH)
        return [_band(self.filterbank, slice(start, start + WIDTH)) for start in starts]

    @cached_property
    def _scratch(self) -> Pool[tuple[Complex, Float32]]:
        shape = (self.stft.block, max(band.bins.stop for band in self._bands))
        return Pool(lambda: (np.empty(shape, np.complex64), np.empty(shape, np.float32)))


def _band(filterbank: Float32, mels: slice) -> Band:
    filters = filterbank[:, mels]
    used = np.flatnonzero(filters.any(axis=1))
    bins = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
    return Band(bins, mels, np.ascontiguousarray(filters[bins]))
