"""The signal path as matrix products, so that it can be a part of a graph: waveform in, waveform out, nothing left for the host.

Frames are slices of blocks of one hop, Fourier transforms are products with constants (float64, rounded once). Everything here stays in
float32 at every precision: powers reach 6e4 and the log-mel's floor is 1e-10.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.clap import ClapFrontEnd
from ..runtime.dsp import AMIN, hann, mel_filterbank, resampling_kernel_2_3

Float64 = NDArray[np.float64]


def frames_of(x: Tensor, size: int, hop: int, count: int) -> Tensor:
    """[B, n] → [B, count, size], frame t from sample t · hop on; zeros after the end."""
    pieces = -(-size // hop)
    blocks = F.pad(x, (0, (count + pieces - 1) * hop - x.shape[1])).reshape(-1, count + pieces - 1, hop)
    return torch.cat([blocks[:, i : i + count, : min(hop, size - i * hop)] for i in range(pieces)], dim=-1)


def overlap_add(frames: Tensor, hop: int) -> Tensor:
    """[B, n, size] → [B, (n - 1 + ceil(size / hop)) · hop], frame t added from sample t · hop on."""
    pieces = frames.split(hop, dim=-1)
    after = len(pieces) - 1
    blocks = [F.pad(piece, (0, hop - piece.shape[-1], i, after - i)) for i, piece in enumerate(pieces)]
    return sum(blocks[1:], blocks[0]).flatten(1)


def dft_matrices(n_fft: int, bins: int) -> tuple[Float64, Float64]:
    """Windowed analysis: real and imaginary part of the first `bins` bins, [n_fft, bins] each."""
    angle = 2 * np.pi * (np.outer(np.arange(n_fft), np.arange(bins)) % n_fft) / n_fft
    return hann(n_fft)[:, None] * np.cos(angle), -hann(n_fft)[:, None] * np.sin(angle)


def inverse_dft_matrices(n_fft: int) -> tuple[Float64, Float64]:
    """Windowed synthesis from real and imaginary parts, [bins, n_fft] each; inner bins count twice, for their mirror images."""
    bins = n_fft // 2 + 1
    angle = 2 * np.pi * (np.outer(np.arange(bins), np.arange(n_fft)) % n_fft) / n_fft
    weight = np.where((np.arange(bins) % (n_fft // 2)) == 0, 1.0, 2.0)[:, None] * hann(n_fft) / n_fft
    return weight * np.cos(angle), -weight * np.sin(angle)


def resampling_matrix(hop: int) -> NDArray[np.float32]:
    """2:3 resampling of a block of `hop` samples with 7 before and 8 after it: [hop + 15, 3 hop / 2]."""
    kernel = resampling_kernel_2_3()
    matrix = np.zeros((hop + kernel.shape[1] - 1, 3 * hop // 2), np.float32)
    for m in range(hop // 2):
        for j in range(3):
            matrix[2 * m : 2 * m + kernel.shape[1], 3 * m + j] = kernel[j]
    return matrix


class Constants(nn.Module):
    """Float32 constants that are no part of a checkpoint, as buffers by their attribute names."""

    def hold(self, **arrays: NDArray[np.floating]) -> None:
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(array.astype(np.float32)), persistent=False)


class Stft(Constants):
    """Centred STFT of [B, n] with reflected ends, real and imaginary part [B, n // hop + 1, bins] each; `bins` of the lowest."""

    real: Tensor
    imag: Tensor

    def __init__(self, n_fft: int, hop: int, bins: int) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        real, imag = dft_matrices(n_fft, bins)
        self.hold(real=real, imag=imag)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = self.n_fft // 2
        padded = F.pad(x, (half, half), mode="reflect")
        frames = frames_of(padded, self.n_fft, self.hop, x.shape[1] // self.hop + 1)
        return frames @ self.real, frames @ self.imag


class InverseStft(Constants):
    """Real and imaginary part [B, frames, bins] → [B, samples]: windowed overlap-add over the window's squared sum."""

    real: Tensor
    imag: Tensor
    gain: Tensor

    def __init__(self, n_fft: int, hop: int, samples: int) -> None:
        super().__init__()
        self.start, self.hop, self.samples = n_fft // 2, hop, samples
        real, imag = inverse_dft_matrices(n_fft)
        window = torch.from_numpy(hann(n_fft) ** 2).expand(1, samples // hop + 1, n_fft)
        power = overlap_add(window, hop)[0, self.start : self.start + samples].clamp_min(1e-11)
        self.hold(real=real, imag=imag, gain=(1 / power).numpy())

    def forward(self, real: Tensor, imag: Tensor) -> Tensor:
        added = overlap_add(real @ self.real + imag @ self.imag, self.hop)
        return added[:, self.start : self.start + self.samples] * self.gain


class LogMel(Constants):
    """[B, samples] at 2/3 of the front end's rate → log-mel in dB [B, frames, n_mels]: resampling, STFT, mel filters."""

    resampling: Tensor
    filters: Tensor

    def __init__(self, front_end: ClapFrontEnd) -> None:
        super().__init__()
        f = front_end
        self.hop, self.samples = 2 * f.hop // 3, f.clip_samples
        filters = mel_filterbank(f.sample_rate, f.n_fft, f.n_mels, f.fmin, f.fmax)
        used = int(np.flatnonzero(filters.any(1))[-1]) + 1  # bins above hold nothing that a filter takes
        self.stft = Stft(f.n_fft, f.hop, used)
        self.hold(resampling=resampling_matrix(self.hop), filters=filters[:used])

    def forward(self, x: Tensor) -> Tensor:
        blocks = -(-x.shape[1] // self.hop)
        halo = self.resampling.shape[0] - self.hop
        resampled = (frames_of(F.pad(x, (7, 0)), self.hop + halo, self.hop, blocks) @ self.resampling).flatten(1)[:, : self.samples]
        real, imag = self.stft(resampled)
        power = (real.square() + imag.square()) @ self.filters
        return power.clamp_min(AMIN).log() * (10 / math.log(10))
