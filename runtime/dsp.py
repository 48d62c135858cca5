"""Short-time Fourier transforms, log-mel spectra and the 2:3 resampler in numpy, as the models were trained with.

Transforms run in float64 inside (numpy is faster and more exact there) and return float32 where an engine wants it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Complex = NDArray[np.complex128]

AMIN = 1e-10  # smallest mel power, -100 dB


@lru_cache(maxsize=8)
def hann(n: int) -> Float64:
    """Periodic Hann window, 0.5 - 0.5 cos(2 pi k / n)."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)


def stft(x: NDArray[np.floating], n_fft: int, hop: int) -> Complex:
    """Centred STFT with a periodic Hann window as long as the transform, without normalisation.

    `x` is [..., samples] with more than n_fft / 2 samples; the ends are reflected. Returns [..., frames, n_fft / 2 + 1] with
    frames = samples // hop + 1; frame t is centred on sample t · hop.
    """
    pad = [(0, 0)] * (x.ndim - 1) + [(n_fft // 2, n_fft // 2)]
    frames = sliding_window_view(np.pad(x, pad, mode="reflect"), n_fft, axis=-1)[..., ::hop, :]
    return np.fft.rfft(frames * hann(n_fft), axis=-1)


def _overlap_add(frames: NDArray[np.floating], hop: int) -> Float64:
    """Sum frames [..., n, size] at multiples of `hop`: [..., (n - 1) · hop + size]."""
    *lead, n, size = frames.shape
    blocks = -(-size // hop)
    padded = np.zeros((*lead, n, blocks * hop))
    padded[..., :size] = frames
    padded = padded.reshape(*lead, n, blocks, hop)
    out = np.zeros((*lead, n + blocks - 1, hop))
    for b in range(blocks):
        out[..., b : b + n, :] += padded[..., b, :]
    return out.reshape(*lead, -1)[..., : (n - 1) * hop + size]


@lru_cache(maxsize=8)
def _window_power(n: int, n_fft: int, hop: int) -> Float64:
    """Overlap-added squared window of n frames, what makes the inverse exact for hops that do not divide the window."""
    return np.maximum(_overlap_add(np.broadcast_to(hann(n_fft) ** 2, (n, n_fft)), hop), 1e-11)


def istft(spectrum: Complex, n_fft: int, hop: int, length: int) -> Float32:
    """Inverse of `stft`: [..., frames, bins] → [..., length] float32, window-weighted overlap-add."""
    frames = np.fft.irfft(spectrum, n_fft, axis=-1) * hann(n_fft)
    total = _overlap_add(frames, hop) / _window_power(frames.shape[-2], n_fft, hop)
    start = n_fft // 2
    return np.ascontiguousarray(total[..., start : start + length], dtype=np.float32)


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


def resample_2_3(x: Float32) -> Float32:
    """Resample by 3/2 (32 to 48 kHz): [..., n] → [..., ceil(3 n / 2)] float32; samples outside are zero."""
    n = x.shape[-1]
    wanted = -(-3 * n // 2)
    steps = -(-wanted // 3)
    pad = [(0, 0)] * (x.ndim - 1) + [(7, 16)]
    frames = sliding_window_view(np.pad(x, pad), 16, axis=-1)[..., ::2, :][..., :steps, :]
    return (frames @ resampling_kernel_2_3().T).reshape(*x.shape[:-1], -1)[..., :wanted]


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


def log_mel(spectrum: Complex, filterbank: Float32) -> Float32:
    """Log-mel spectrum in dB, 10 log10(max(mel power, 1e-10)): [..., frames, bins] → [..., frames, n_mels] float32."""
    power = spectrum.real**2 + spectrum.imag**2
    return (10 * np.log10(np.maximum(power @ filterbank, AMIN))).astype(np.float32)
