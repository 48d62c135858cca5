"""The signal path as matrix products, so that it can be a part of a graph: waveform in, waveform out, nothing left for the host.

Waveforms are rows of blocks of one hop. A frame is a few neighbouring blocks, so one gather makes all frames, and another one adds
them up again; where a frame does not fill its blocks, the constants have zeros. (Slices would do the same, but every slice or padding
becomes some thirty layers in TensorRT.) Fourier transforms are products with constants, made in float64 and rounded once. Everything
here stays in float32 at every precision: powers reach 6e4 and the log-mel's floor is 1e-10.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.clap import ClapFrontEnd
from ..runtime.dsp import AMIN, hann, mel_filterbank
from ..runtime.resampler import resampling_kernel_2_3

Float64 = NDArray[np.float64]


def blocks_of(size: int, hop: int) -> int:
    """Blocks that a frame takes up."""
    return -(-size // hop)


def frame_index(count: int, blocks: int) -> Tensor:
    """Block b of frame t is block t + b of the waveform: [count · blocks]."""
    return (torch.arange(count)[:, None] + torch.arange(blocks)).flatten()


def overlap_index(count: int, blocks: int, first: int, wanted: int) -> Tensor:
    """Row of part b of the frame that meets block j of the result, for j from `first` on: [wanted · blocks].

    Rows are parts of frames, `blocks` of each, after `blocks - 1` empty frames; what lies beyond the last is cut to it, and is empty too.
    """
    frame = torch.arange(first, first + wanted)[:, None] - torch.arange(blocks) + blocks - 1
    return (frame.clamp_max(count + 2 * (blocks - 1) - 1) * blocks + torch.arange(blocks)).flatten()


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


def fill(matrix: NDArray[np.floating], before: int, size: int, axis: int) -> NDArray[np.floating]:
    """Zeros before and after a matrix along one axis, up to `size`."""
    padding = [(0, 0), (0, 0)]
    padding[axis] = (before, size - before - matrix.shape[axis])
    return np.pad(matrix, padding)


class Constants(nn.Module):
    """Constants that are no part of a checkpoint, as buffers by their attribute names; floating ones in float32."""

    def hold(self, **arrays: NDArray[np.floating] | Tensor) -> None:
        for name, array in arrays.items():
            value = array if isinstance(array, Tensor) else torch.from_numpy(array.astype(np.float32))
            self.register_buffer(name, value, persistent=False)


class Framed(Constants):
    """Frames of a waveform [B, samples], padded by `before` and as far as needed after it, times matrices [size, …]."""

    index: Tensor

    def __init__(self, samples: int, size: int, hop: int, count: int, before: int, mode: str) -> None:
        super().__init__()
        blocks = blocks_of(size, hop)
        self.hop, self.width, self.mode = hop, blocks * hop, mode
        self.padding = (before, (count + blocks - 1) * hop - before - samples)
        self.shape = (count, self.width)
        self.hold(index=frame_index(count, blocks))

    def forward(self, x: Tensor) -> Tensor:
        """[B, count, width], a width of whole blocks."""
        padded = F.pad(x, self.padding, mode=self.mode)
        return padded.reshape(-1, padded.shape[1] // self.hop, self.hop).index_select(1, self.index).reshape(-1, *self.shape)


class Stft(Constants):
    """Centred STFT of [B, samples] with reflected ends: real and imaginary part [B, frames, bins], `bins` of the lowest."""

    real: Tensor
    imag: Tensor

    def __init__(self, samples: int, n_fft: int, hop: int, bins: int) -> None:
        super().__init__()
        self.frames = Framed(samples, n_fft, hop, samples // hop + 1, n_fft // 2, "reflect")
        real, imag = (fill(matrix, 0, self.frames.width, 0) for matrix in dft_matrices(n_fft, bins))
        self.hold(real=real, imag=imag)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        frames = self.frames(x)
        return frames @ self.real, frames @ self.imag


class InverseStft(Constants):
    """Real and imaginary part [B, frames, bins] → [B, samples]: windowed overlap-add over the window's squared sum."""

    real: Tensor
    imag: Tensor
    index: Tensor
    gain: Tensor

    def __init__(self, n_fft: int, hop: int, samples: int) -> None:
        super().__init__()
        shift = -(n_fft // 2) % hop  # inside the frames' blocks, so that the result begins with a block
        self.blocks, self.hop, self.samples = blocks_of(n_fft + shift, hop), hop, samples
        count, wanted = samples // hop + 1, blocks_of(samples, hop)
        real, imag = (fill(matrix, shift, self.blocks * hop, 1) for matrix in inverse_dft_matrices(n_fft))
        self.hold(real=real, imag=imag, index=overlap_index(count, self.blocks, (n_fft // 2 + shift) // hop, wanted))
        window = torch.from_numpy(fill(hann(n_fft)[None] ** 2, shift, self.blocks * hop, 1))
        self.hold(gain=(1 / self._added(window.repeat(count, 1)[None]).clamp_min(1e-11)).numpy())

    def _added(self, frames: Tensor) -> Tensor:
        after = self.blocks - 1
        parts = F.pad(frames, (0, 0, after, after)).reshape(-1, (frames.shape[1] + 2 * after) * self.blocks, self.hop)
        wanted = len(self.index) // self.blocks
        return parts.index_select(1, self.index).reshape(-1, wanted, self.blocks, self.hop).sum(2).flatten(1)

    def forward(self, real: Tensor, imag: Tensor) -> Tensor:
        target = self._added(real @ self.real + imag @ self.imag) * self.gain
        return target if target.shape[1] == self.samples else target[:, : self.samples]


class LogMel(Constants):
    """[B, samples] at 2/3 of the front end's rate → log-mel in dB [B, frames, n_mels]: resampling, STFT, mel filters."""

    resampling: Tensor
    filters: Tensor

    def __init__(self, samples: int, front_end: ClapFrontEnd) -> None:
        super().__init__()
        f = front_end
        hop, self.samples = 2 * f.hop // 3, f.clip_samples
        matrix = resampling_matrix(hop)
        self.frames = Framed(samples, len(matrix), hop, blocks_of(samples, hop), 7, "constant")
        filters = mel_filterbank(f.sample_rate, f.n_fft, f.n_mels, f.fmin, f.fmax)
        used = int(np.flatnonzero(filters.any(1))[-1]) + 1  # bins above hold nothing that a filter takes
        self.stft = Stft(f.clip_samples, f.n_fft, f.hop, used)
        self.hold(resampling=fill(matrix, 0, self.frames.width, 0), filters=filters[:used])

    def forward(self, x: Tensor) -> Tensor:
        resampled = (self.frames(x) @ self.resampling).flatten(1)
        real, imag = self.stft(resampled if resampled.shape[1] == self.samples else resampled[:, : self.samples])
        power = (real.square() + imag.square()) @ self.filters
        return power.clamp_min(AMIN).log() * (10 / math.log(10))
