"""The short-time Fourier transform and its inverse, in blocks of frames that stay in the processor's cache.

The forward transform runs in float64 (numpy is faster and more exact there) and its spectra are complex64; the inverse runs in float32.
Both allocate nothing but their results: working memory is reused and does not grow with the signal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from .dsp import Complex, Float32, Float64, cut, hann
from .scratch import Pool

BLOCK = 1 << 17  # samples in the frames of one block
QUIET = 1e-11  # smallest power of the overlapped windows that the inverse divides by
Real = NDArray[np.floating]


@dataclass(frozen=True)
class Stft:
    """Centred STFT with a periodic Hann window as long as the transform, without normalisation; sizes in samples.

    The ends of a signal are reflected; frame t is centred on sample t · hop. One instance may be shared by threads.
    """

    n_fft: int
    hop: int

    @property
    def bins(self) -> int:
        return self.n_fft // 2 + 1

    @cached_property
    def block(self) -> int:
        """Frames in a block."""
        return max(1, BLOCK // self.n_fft)

    def frames(self, samples: int) -> int:
        """Frames of a signal."""
        return samples // self.hop + 1

    def forward(self, x: Real) -> Complex:
        """[..., samples] → [..., frames, bins]; more than n_fft / 2 samples."""
        out = np.empty((*x.shape[:-1], self.frames(x.shape[-1]), self.bins), np.complex64)
        for row in np.ndindex(x.shape[:-1]):
            for rows, spectrum in self.blocks(x[row]):
                out[row][rows] = spectrum
        return out

    def blocks(self, x: Real) -> Iterator[tuple[slice, NDArray[np.complex128]]]:
        """Spectra of one signal [samples], block by block: which frames, and [≤ block, bins], overwritten by the next block."""
        if len(x) <= (self.n_fft + 1) // 2:
            raise ValueError(f"{len(x)} samples are too few for a transform of {self.n_fft}")
        with self._forward_scratch.borrow() as scratch:
            for rows in self._rows(self.frames(len(x))):
                yield rows, scratch.transform(x, rows.start * self.hop - self.n_fft // 2, rows.stop - rows.start)

    def inverse(self, spectrum: Complex, length: int, *mask: Real) -> Float32:
        """Window-weighted overlap-add: [..., frames, bins] → [..., length], zero where no frame reaches.

        Float32's noise is divided by the window, so hops near n_fft / 2 lose precision in the last samples after the last frame's centre.
        The spectrum is first multiplied by the mask, which is one array of its shape or three: magnitude, cosine and sine.
        """
        if any(part.shape != spectrum.shape for part in mask):
            raise ValueError(f"masks {[part.shape for part in mask]} do not fit a spectrum {spectrum.shape}")
        out = np.zeros((*spectrum.shape[:-2], length), np.float32)
        with self._inverse_scratch.borrow() as scratch:
            for row in np.ndindex(spectrum.shape[:-2]):
                self._inverse_row(scratch, spectrum[row], [part[row] for part in mask], out[row])
        return out

    def _inverse_row(self, scratch: _InverseScratch, spectrum: Complex, mask: list[Real], out: Float32) -> None:
        frames, half = len(spectrum), self.n_fft // 2
        scale = _inverse_power(frames, self.n_fft, self.hop)
        scratch.sums[:] = 0  # a call that was interrupted leaves some
        for rows in self._rows(frames):
            scratch.load(spectrum[rows], *(part[rows] for part in mask))
            scratch.overlap_add(rows.stop - rows.start)
            start = rows.start * self.hop  # of the sums; the signal begins at n_fft / 2
            done = (rows.stop - rows.start) * self.hop if rows.stop < frames else scratch.sums.size
            begin, end = max(start, half), min(start + done, len(scale), half + len(out))
            if begin < end:
                np.multiply(scratch.sums[begin - start : end - start], scale[begin:end], out=out[begin - half : end - half])
            scratch.advance(done)

    def _rows(self, frames: int) -> Iterator[slice]:
        return (slice(begin, min(begin + self.block, frames)) for begin in range(0, frames, self.block))

    @cached_property
    def _forward_scratch(self) -> Pool[_ForwardScratch]:
        return Pool(partial(_ForwardScratch, self.n_fft, self.hop, self.block))  # without self: no cycle, freed at once

    @cached_property
    def _inverse_scratch(self) -> Pool[_InverseScratch]:
        return Pool(partial(_InverseScratch, self.n_fft, self.hop, self.block))


class _ForwardScratch:
    """One block's samples, windowed frames and spectra."""

    def __init__(self, n_fft: int, hop: int, block: int) -> None:
        self._n_fft, self._hop, self._window = n_fft, hop, hann(n_fft)
        self._samples = np.empty((block - 1) * hop + n_fft)
        self._overlapping = as_strided(self._samples, (block, n_fft), (8 * hop, 8), writeable=False)
        self._frames = np.empty((block, n_fft))
        self._spectrum = np.empty((block, n_fft // 2 + 1), np.complex128)

    def transform(self, x: Real, begin: int, n: int) -> NDArray[np.complex128]:
        """Spectra of n frames, the first of which begins at sample `begin`."""
        _cut_reflected(x, begin, self._samples[: (n - 1) * self._hop + self._n_fft])
        np.multiply(self._overlapping[:n], self._window, out=self._frames[:n])
        return np.fft.rfft(self._frames[:n], axis=-1, out=self._spectrum[:n])


class _InverseScratch:
    """One block's spectra, frames and their sums, which reach into the next block."""

    def __init__(self, n_fft: int, hop: int, block: int) -> None:
        self._n_fft, self._hop, self._window = n_fft, hop, hann(n_fft).astype(np.float32)
        self._spectrum = np.empty((block, n_fft // 2 + 1), np.complex64)
        self._factor = np.empty_like(self._spectrum)
        self._frames: NDArray[Any] = np.empty((block, n_fft), np.float32)  # numpy's types of irfft know float64 only
        self.sums = np.zeros((block + -(-n_fft // hop) - 1) * hop, np.float32)

    def load(self, spectrum: Complex, magnitude: Real | None = None, *turn: Real) -> None:
        """A block's spectrum · magnitude · (cos + i sin)."""
        target, factor = self._spectrum[: len(spectrum)], self._factor[: len(spectrum)]
        target[:] = spectrum
        if magnitude is not None:
            factor[:] = magnitude
            target *= factor
        if turn:
            factor.real, factor.imag = turn
            target *= factor

    def overlap_add(self, n: int) -> None:
        """Add the n loaded frames, windowed, to the sums."""
        frames = np.fft.irfft(self._spectrum[:n], self._n_fft, axis=-1, out=self._frames[:n])
        frames *= self._window
        sums = self.sums.reshape(-1, self._hop)
        for step, begin in enumerate(range(0, self._n_fft, self._hop)):
            piece = frames[:, begin : begin + self._hop]
            sums[step : step + n, : piece.shape[1]] += piece

    def advance(self, done: int) -> None:
        """Forget the first `done` sums."""
        kept = self.sums.size - done
        self.sums[:kept] = self.sums[done:]
        self.sums[kept:] = 0


def _cut_reflected(x: Real, begin: int, out: Float64) -> None:
    left, right = cut(x, begin, out)
    out[:left] = x[left:0:-1]
    if right:
        out[-right:] = x[-2 : -2 - right : -1]


@lru_cache(maxsize=8)
def _inverse_power(frames: int, n_fft: int, hop: int) -> Float32:
    """1 / overlap-added squared window, which makes the inverse exact for hops that do not divide the window."""
    power, square = np.zeros((frames - 1) * hop + n_fft), hann(n_fft) ** 2
    for begin in range(0, frames * hop, hop):
        power[begin : begin + n_fft] += square
    scale = (1 / np.maximum(power, QUIET)).astype(np.float32)
    scale.flags.writeable = False
    return scale
