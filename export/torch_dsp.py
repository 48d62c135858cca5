"""The signal path in PyTorch: the reference that the numpy runtime and every engine are measured against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..runtime.clap import ClapFrontEnd
from ..runtime.dsp import AMIN, mel_filterbank


def stft(x: Tensor, n_fft: int, hop: int) -> Tensor:
    """[B, n] → complex [B, frames, bins]; periodic Hann, centred, reflected ends."""
    window = torch.hann_window(n_fft, dtype=x.dtype)
    return torch.stft(x, n_fft, hop, window=window, center=True, pad_mode="reflect", return_complex=True).mT


def istft(spectrum: Tensor, n_fft: int, hop: int, length: int) -> Tensor:
    """Complex [B, frames, bins] → [B, length]: window-weighted overlap-add over the window's squared sum."""
    window = torch.hann_window(n_fft, dtype=spectrum.real.dtype)
    frames = torch.fft.irfft(spectrum, n_fft) * window
    size = (1, (frames.shape[1] - 1) * hop + n_fft)
    columns = torch.stack([frames, (window**2).expand_as(frames)])
    total, power = (F.fold(c.mT, size, (1, n_fft), stride=(1, hop))[:, 0, 0] for c in columns)
    start = n_fft // 2
    return (total / power.clamp_min(1e-11))[:, start : start + length]


def resample_2_3(x: Tensor) -> Tensor:
    """Windowed-sinc resampling by 3/2, [B, n] → [B, ceil(3 n / 2)]: 16 taps for each of three phases, roll-off 0.99."""
    phase = (torch.arange(0, -3, -1) / 3)[:, None, None]
    t = ((phase + torch.arange(-7, 9, dtype=torch.float64) / 2) * 1.98).clamp(-6, 6)
    kernel = (torch.cos(t * torch.pi / 12) ** 2 * torch.special.sinc(t) * 0.99).to(x.dtype)
    phases = F.conv1d(F.pad(x, (7, 16))[:, None], kernel, stride=2)
    return phases.mT.flatten(1)[:, : -(-3 * x.shape[1] // 2)]


def log_mel(x: Tensor, front_end: ClapFrontEnd) -> Tensor:
    """[B, n] at the front end's rate → [B, frames, n_mels] in dB."""
    f = front_end
    filters = torch.from_numpy(mel_filterbank(f.sample_rate, f.n_fft, f.n_mels, f.fmin, f.fmax))
    power = stft(x, f.n_fft, f.hop).abs().square()
    return 10 * torch.log10((power @ filters.to(power.dtype)).clamp_min(AMIN))
