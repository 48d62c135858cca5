"""The inverse transform with a cheap gradient: export.torch_dsp.istft by shifted sums in place of a fold."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def _overlap_add(frames: Tensor, hop: int) -> Tensor:
    """[B, n, size] at multiples of `hop` → [B, samples]."""
    batch, n, size = frames.shape
    blocks = -(-size // hop)
    parts = F.pad(frames, (0, blocks * hop - size)).reshape(batch, n, blocks, hop)
    total = F.pad(parts[:, :, 0], (0, 0, 0, blocks - 1))
    for b in range(1, blocks):
        total = total + F.pad(parts[:, :, b], (0, 0, b, blocks - 1 - b))
    return total.reshape(batch, -1)


@lru_cache(maxsize=2)
def _power(n: int, n_fft: int, hop: int) -> Tensor:
    return _overlap_add((torch.hann_window(n_fft) ** 2).expand(1, n, n_fft), hop).clamp_min(1e-11)


def istft(spectrum: Tensor, n_fft: int, hop: int, length: int) -> Tensor:
    """Complex [B, frames, bins] → [B, length]."""
    frames = torch.fft.irfft(spectrum, n_fft) * torch.hann_window(n_fft)
    start = n_fft // 2
    wanted = slice(start, start + length)
    return _overlap_add(frames, hop)[:, wanted] / _power(spectrum.shape[1], n_fft, hop)[:, wanted]
