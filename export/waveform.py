"""The signal path as matrix products, so that it can be a part of a graph: waveform in, waveform out, nothing left for the host.

A waveform is a row of small blocks, of which hops and halves of frames are multiples; so one gather makes all frames, and another one
adds them up again. (Slices would do the same, but every slice, split or padding becomes some thirty layers in TensorRT.) A Fourier
transform is one step of decimation in frequency, after which even and odd bins are products of half the length, with constants made
in float64 and rounded once: half the arithmetic of the direct form, which a GPU must do outside its tensor cores. Everything here
stays in float32 at every precision: powers reach 6e4 and the log-mel's floor is 1e-10.

Spectra are [B, 2, 2, frames, q]: even bins, then odd bins, q of each, the last odd one beyond the transform and zero; real, imaginary.
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
from .specs import GraphSpec, Wrap

Float64 = NDArray[np.float64]
RESAMPLED = 64  # samples that the resampler takes in one row: small, as most of its matrix is zeros


def frame_index(count: int, step: int, blocks: int) -> Tensor:
    """Block b of frame t is block step · t + b of the waveform: [count · blocks], all first halves before all second ones."""
    index = torch.arange(count)[:, None] * step + torch.arange(blocks)
    return index.reshape(count, 2, -1).transpose(0, 1).flatten()


def overlap_index(count: int, step: int, blocks: int, wanted: range) -> Tensor:
    """Parts of frames that meet each block in `wanted` of the result, where frame t begins with block step · t: [wanted · parts].

    Parts are numbered as `frame_index` has them, for one frame more than there are, which is empty and stands where no frame is.
    """
    begin = torch.tensor(wanted)[:, None]
    part = begin % step + step * torch.arange(-(-blocks // step))
    frame = (begin - part) // step
    there = (part < blocks) & (frame >= 0) & (frame < count)
    frame, part = torch.where(there, frame, count), torch.where(there, part, 0)
    half = blocks // 2
    return ((part // half) * (count + 1) * half + frame * half + part % half).flatten()


def analysis(n_fft: int, bins: int) -> Float64:
    """Real and imaginary part of bins 2 j of x[n] + x[n + h], and 2 j + 1 of x[n] - x[n + h], h = n_fft / 2: [2, 2, h, q]."""
    q = -(-bins // 2)
    k = (2 * np.arange(q) + np.arange(2)[:, None])[:, None, None]
    angle = 2 * np.pi * ((np.arange(n_fft // 2)[:, None] * k) % n_fft) / n_fft
    return np.concatenate([np.cos(angle), -np.sin(angle)], axis=1) * (k < bins)


def synthesis(n_fft: int) -> Float64:
    """The way back, from all bins to half the sum and half the difference of a frame's halves: [2, 2, q, h]. Inner bins count for two."""
    half, q = n_fft // 2, (n_fft // 2 + 2) // 2
    k = (2 * np.arange(q) + np.arange(2)[:, None])[:, None, :, None]
    weight = np.where(k % half == 0, 1.0, 2.0) * (k <= half) / n_fft
    angle = 2 * np.pi * ((k * np.arange(half)) % n_fft) / n_fft
    return np.concatenate([np.cos(angle), -np.sin(angle)], axis=1) * weight


def resampling_matrix(hop: int) -> NDArray[np.float32]:
    """2:3 resampling of a block of `hop` samples with 7 before and 8 after it: [hop + 15, 3 hop / 2]."""
    kernel = resampling_kernel_2_3()
    matrix = np.zeros((hop + kernel.shape[1] - 1, 3 * hop // 2), np.float32)
    for m in range(hop // 2):
        for j in range(3):
            matrix[2 * m : 2 * m + kernel.shape[1], 3 * m + j] = kernel[j]
    return matrix


class Constants(nn.Module):
    """Constants that are no part of a checkpoint, as buffers by their attribute names; floating ones in float32."""

    def hold(self, **arrays: NDArray[np.floating] | Tensor) -> None:
        for name, array in arrays.items():
            value = array if isinstance(array, Tensor) else torch.from_numpy(array.astype(np.float32))
            self.register_buffer(name, value, persistent=False)


class Frames(Constants):
    """Frames of a waveform [B, samples], padded by `before` and as far as needed after it, in halves: [B, 2, count, size / 2]."""

    index: Tensor

    def __init__(self, samples: int, size: int, hop: int, count: int, before: int, mode: str) -> None:
        super().__init__()
        self.block, self.mode = math.gcd(hop, size // 2), mode
        self.padding = (before, (count - 1) * hop + size - before - samples)
        self.shape = (2, count, size // 2)
        self.hold(index=frame_index(count, hop // self.block, size // self.block))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, self.padding, mode=self.mode)
        return padded.reshape(-1, padded.shape[1] // self.block, self.block).index_select(1, self.index).reshape(-1, *self.shape)


class Stft(Constants):
    """Centred STFT of [B, samples] with reflected ends: `bins` of the lowest, [B, 2, 2, frames, q]."""

    window: Tensor
    matrix: Tensor

    def __init__(self, samples: int, n_fft: int, hop: int, bins: int) -> None:
        super().__init__()
        self.frames = Frames(samples, n_fft, hop, samples // hop + 1, n_fft // 2, "reflect")
        self.hold(window=hann(n_fft).reshape(2, 1, -1), matrix=analysis(n_fft, bins))

    def forward(self, x: Tensor) -> Tensor:
        windowed = self.frames(x) * self.window
        first, second = windowed[:, 0], windowed[:, 1]
        return torch.stack([first + second, first - second], dim=1)[:, :, None] @ self.matrix


def squared(spectrum: Tensor) -> Tensor:
    """Power of even and odd bins, [B, 2, frames, q]."""
    return spectrum.square().sum(2)


def in_order(halves: Tensor, bins: int) -> Tensor:
    """Even and odd bins [B, 2, frames, q] → [B, frames, bins]."""
    rows = halves.permute(0, 2, 3, 1).flatten(2)
    return rows if rows.shape[2] == bins else rows[:, :, :bins]


def in_halves(rows: Tensor) -> Tensor:
    """[B, frames, bins] → even and odd bins [B, 2, frames, q]."""
    _, frames, bins = rows.shape
    return F.pad(rows, (0, bins % 2)).reshape(-1, frames, (bins + 1) // 2, 2).permute(0, 3, 1, 2)


class InverseStft(Constants):
    """Spectrum [B, 2, 2, frames, q] → [B, samples]: windowed overlap-add over the window's squared sum."""

    window: Tensor
    matrix: Tensor
    index: Tensor
    gain: Tensor

    def __init__(self, n_fft: int, hop: int, samples: int) -> None:
        super().__init__()
        count, self.block, self.samples = samples // hop + 1, math.gcd(hop, n_fft // 2), samples
        start, step, blocks = n_fft // 2 // self.block, hop // self.block, n_fft // self.block
        self.wanted = -(-samples // self.block)
        self.hold(window=hann(n_fft).reshape(2, 1, -1), matrix=synthesis(n_fft))
        self.hold(index=overlap_index(count, step, blocks, range(start, start + self.wanted)))
        power = self._added(torch.from_numpy(hann(n_fft).reshape(1, 2, 1, -1) ** 2).repeat(1, 1, count, 1))
        self.hold(gain=(1 / power.clamp_min(1e-11)).numpy())

    def _added(self, halves: Tensor) -> Tensor:
        _, _, count, half = halves.shape
        parts = F.pad(halves, (0, 0, 0, 1)).reshape(-1, 2 * (count + 1) * half // self.block, self.block)
        return parts.index_select(1, self.index).reshape(-1, self.wanted, len(self.index) // self.wanted, self.block).sum(2).flatten(1)

    def forward(self, spectrum: Tensor) -> Tensor:
        parts = (spectrum @ self.matrix).sum(2)
        even, odd = parts[:, 0], parts[:, 1]
        target = self._added(torch.stack([even + odd, even - odd], dim=1) * self.window) * self.gain
        return target if target.shape[1] == self.samples else target[:, : self.samples]


class LogMel(Constants):
    """[B, samples] at 2/3 of the front end's rate → log-mel in dB [B, frames, n_mels]: resampling, STFT, mel filters."""

    resampling: Tensor
    filters: Tensor

    def __init__(self, samples: int, front_end: ClapFrontEnd) -> None:
        super().__init__()
        f = front_end
        self.samples = f.clip_samples
        self.frames = Frames(samples, 2 * RESAMPLED, RESAMPLED, -(-samples // RESAMPLED), 7, "constant")
        matrix = resampling_matrix(RESAMPLED)
        matrix = np.pad(matrix, ((0, 2 * RESAMPLED - len(matrix)), (0, 0)))
        filters = mel_filterbank(f.sample_rate, f.n_fft, f.n_mels, f.fmin, f.fmax)
        used = 2 * (int(np.flatnonzero(filters.any(1))[-1]) // 2 + 1)  # bins above hold nothing that a filter takes
        filters = np.pad(filters, ((0, max(used - len(filters), 0)), (0, 0)))[:used]
        self.stft = Stft(f.clip_samples, f.n_fft, f.hop, used)
        self.hold(resampling=matrix.reshape(2, RESAMPLED, -1), filters=np.stack([filters[::2], filters[1::2]]))

    def forward(self, x: Tensor) -> Tensor:
        resampled = (self.frames(x) @ self.resampling).sum(1).flatten(1)
        spectrum = self.stft(resampled if resampled.shape[1] == self.samples else resampled[:, : self.samples])
        power = (squared(spectrum) @ self.filters).sum(1)
        return power.clamp_min(AMIN).log() * (10 / math.log(10))


class FrontEnd(nn.Module):
    """Mixture [B, samples] → magnitude [B, frames, bins], no smaller than `floor`, and the spectrum."""

    def __init__(self, samples: int, n_fft: int, hop: int, floor: float = 0.0) -> None:
        super().__init__()
        self.bins, self.floor = n_fft // 2 + 1, floor
        self.stft = Stft(samples, n_fft, hop, self.bins)

    def forward(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = self.stft(mixture)
        power = squared(spectrum)
        return in_order((power.clamp_min(self.floor**2) if self.floor else power).sqrt(), self.bins), spectrum


class BackEnd(nn.Module):
    """Mask [B, frames, bins] and the mixture's spectrum → target [B, samples]."""

    def __init__(self, samples: int, n_fft: int, hop: int) -> None:
        super().__init__()
        self.istft = InverseStft(n_fft, hop, samples)

    def forward(self, mask: Tensor, spectrum: Tensor) -> Tensor:
        return self.istft(spectrum * in_halves(mask)[:, :, None])


class RotatingBackEnd(BackEnd):
    """As `BackEnd`, for three-part masks, which also rotate the phase."""

    def forward(self, mask: Tensor, mask_cos: Tensor, mask_sin: Tensor, spectrum: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = (in_halves(mask * part) for part in (mask_cos, mask_sin))
        real, imag = spectrum[:, :, 0], spectrum[:, :, 1]
        return self.istft(torch.stack([cos * real - sin * imag, cos * imag + sin * real], dim=2))


def from_waveform(samples: int, n_fft: int, hop: int, maps: tuple[str, ...], front: GraphSpec | None = None, floor: float = 0.0) -> Wrap:
    """The graph `separator_waveform`: the graph `separator`, from magnitude to `maps`, between transforms.

    `front` takes the place of `FrontEnd` for models that are given more than a magnitude; its last output is the spectrum, `bins`.
    """
    frames, bins = samples // hop + 1, n_fft // 2 + 1
    if front is None:
        front = GraphSpec("before", FrontEnd(samples, n_fft, hop, floor), {"mixture": torch.randn(2, samples)}, ("magnitude", "bins"))
    examples = {**{name: torch.rand(2, frames, bins) for name in maps}, "bins": torch.randn(2, 2, 2, frames, (bins + 1) // 2)}
    back = GraphSpec("after", (BackEnd if len(maps) == 1 else RotatingBackEnd)(samples, n_fft, hop), examples, ("target",))
    return Wrap("separator_waveform", "separator", front, back)
