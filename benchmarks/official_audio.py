"""What the official CLAPSep and CLAP code does with sound, in PyTorch eager: conv STFT and ISTFT, resampler, log-mel, HTSAT.

The plain way of every step, as a baseline to measure against; written from a description of the computation, without the official
code. CLAPSep: Ma et al., arXiv 2402.17455. HTSAT: Chen et al., arXiv 2202.00874. Parameters and derived buffers carry the published
names. Outputs that the official code computes and nobody uses are computed here too: they are part of its cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from clapsep.export.htsat import HtsatConfig, relative_position_index, shift_mask
from clapsep.runtime.clap import ClapFrontEnd
from clapsep.runtime.dsp import mel_filterbank
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 527  # AudioSet's, of the classifier that CLAP's audio branch still carries
AMIN = 1e-10


def _dft(n: int) -> np.ndarray:
    """exp(-2 pi i k f / n) as powers of one root, complex128 [n, n]."""
    return np.power(np.exp(-2j * np.pi / n), np.outer(np.arange(n), np.arange(n)))


def _hann(n: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)


def _set(conv: nn.Conv1d, weight: np.ndarray) -> None:
    conv.weight = nn.Parameter(torch.from_numpy(weight).float(), requires_grad=False)


class Stft(nn.Module):
    """[B, n] → real and imaginary part [B, 1, n // hop + 1, bins]: two convolutions with windowed DFT kernels."""

    def __init__(self, n_fft: int, hop: int) -> None:
        super().__init__()
        bins = n_fft // 2 + 1
        self.conv_real, self.conv_imag = (nn.Conv1d(1, bins, n_fft, hop, bias=False) for _ in range(2))
        kernels = (_dft(n_fft)[:bins] * _hann(n_fft))[:, None]
        _set(self.conv_real, kernels.real)
        _set(self.conv_imag, kernels.imag)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = self.conv_real.kernel_size[0] // 2
        padded = F.pad(x[:, None], (half, half), mode="reflect")
        real, imag = self.conv_real(padded), self.conv_imag(padded)
        return real[:, None].transpose(2, 3), imag[:, None].transpose(2, 3)


class Istft(nn.Module):
    """Real and imaginary part [B, 1, frames, bins] → [B, length]: two convolutions over all n_fft bins, then fold to overlap and add."""

    ola_window: Tensor

    def __init__(self, n_fft: int, hop: int) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.conv_real, self.conv_imag = (nn.Conv1d(n_fft, n_fft, 1, bias=False) for _ in range(2))
        kernels = (_dft(n_fft).conj() / n_fft * _hann(n_fft)[:, None])[..., None]
        _set(self.conv_real, kernels.real)
        _set(self.conv_imag, kernels.imag)
        self.register_buffer("ola_window", torch.from_numpy(_hann(n_fft) ** 2).float())

    def overlap_add(self, frames: Tensor) -> Tensor:
        """[B, n_fft, frames] → [B, (frames - 1) · hop + n_fft]."""
        size = (frames.shape[2] - 1) * self.hop + self.n_fft
        return F.fold(frames, (1, size), (1, self.n_fft), stride=(1, self.hop))[:, 0, 0]

    def forward(self, real: Tensor, imag: Tensor, length: int) -> Tensor:
        real, imag = real[:, 0].transpose(1, 2), imag[:, 0].transpose(1, 2)
        real = torch.cat([real, real[:, 1:-1].flip(1)], dim=1)
        imag = torch.cat([imag, -imag[:, 1:-1].flip(1)], dim=1)
        total = self.overlap_add(self.conv_real(real) - self.conv_imag(imag))
        power = self.overlap_add(self.ola_window[None, :, None].repeat(1, 1, real.shape[2])).clamp(min=1e-11)
        return (total / power)[:, self.n_fft // 2 : self.n_fft // 2 + length]


def magphase(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitude, and cosine and sine of the phase, each of the inputs' shape."""
    magnitude = (real**2 + imag**2) ** 0.5
    size = magnitude.clamp(min=AMIN)
    return magnitude, real / size, imag / size


class Resampler(nn.Module):
    """32 to 48 kHz, [B, n] → [B, ceil(3 n / 2)]: windowed sinc of 16 taps for each of three phases, as torchaudio does it."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        phase = torch.arange(0, -3, -1, dtype=torch.float32) / 3
        t = ((phase[:, None, None] + torch.arange(-7, 9, dtype=torch.float64) / 2) * 1.98).clamp(-6, 6)
        sinc = torch.where(t == 0, 1.0, (t * math.pi).sin() / (t * math.pi))
        self.register_buffer("kernel", (0.99 * (t * math.pi / 12).cos() ** 2 * sinc).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        phases = F.conv1d(F.pad(x, (7, 9))[:, None], self.kernel, stride=2)
        return phases.transpose(1, 2).reshape(len(x), -1)[:, : math.ceil(1.5 * x.shape[1])]


class Spectrogram(nn.Module):
    """[B, n] → power [B, 1, frames, bins]."""

    def __init__(self, n_fft: int, hop: int) -> None:
        super().__init__()
        self.stft = Stft(n_fft, hop)

    def forward(self, x: Tensor) -> Tensor:
        real, imag = self.stft(x)
        return real**2 + imag**2


class LogMel(nn.Module):
    """Power [B, 1, frames, bins] → dB [B, 1, frames, n_mels]."""

    def __init__(self, f: ClapFrontEnd) -> None:
        super().__init__()
        filters = mel_filterbank(f.sample_rate, f.n_fft, f.n_mels, f.fmin, f.fmax)
        self.melW = nn.Parameter(torch.from_numpy(filters), requires_grad=False)

    def forward(self, power: Tensor) -> Tensor:
        return 10 * torch.log10(torch.matmul(power, self.melW).clamp(min=AMIN))


class LoRALinear(nn.Linear):
    """x Wᵀ + b + ((x Aᵀ) Bᵀ) · alpha / rank, three products at each call until `merge` adds the update to the weight."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float) -> None:
        super().__init__(inputs, outputs)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))
        self.scaling, self.merged = alpha / rank, False

    def merge(self) -> None:
        """Add B A · alpha / rank to the weight in float32, as loralib does when a layer with merge_weights is set to eval."""
        if not self.merged:
            self.weight.data += (self.lora_B @ self.lora_A) * self.scaling
            self.merged = True

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        return y if self.merged else y + (input @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1)) * self.scaling


class WindowAttention(nn.Module):
    """Attention in windows [B · windows, w², C] → the same and its maps; the relative position bias is gathered at each call."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int, lora_rank: int, lora_alpha: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", torch.from_numpy(relative_position_index(window)))
        if lora_rank:
            self.qkv: nn.Linear = LoRALinear(dim, 3 * dim, lora_rank, lora_alpha)
            self.proj: nn.Linear = LoRALinear(dim, dim, lora_rank, lora_alpha)
        else:
            self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0] * self.scale, qkv[1], qkv[2]
        maps = query @ key.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(tokens, tokens, -1)
        maps = maps + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            windows = maps.view(rows // len(mask), len(mask), self.heads, tokens, tokens)
            maps = (windows + mask.unsqueeze(1).unsqueeze(0)).view(-1, self.heads, tokens, tokens)
        maps = maps.softmax(dim=-1)
        return self.proj((maps @ value).transpose(1, 2).reshape(rows, tokens, dim)), maps


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def window_partition(x: Tensor, window: int) -> Tensor:
    """[B, H, W, C] → [B · windows, window, window, C]."""
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window, window, c)


def window_reverse(windows: Tensor, window: int, grid: int) -> Tensor:
    """[B · windows, window, window, C] → [B, grid, grid, C]."""
    n, c = grid // window, windows.shape[-1]
    x = windows.view(len(windows) // n**2, n, n, window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, grid, grid, c)


class SwinBlock(nn.Module):
    """[B, grid², C] in raster order → the same and the attention maps; every second block rolls the grid by half a window."""

    attn_mask: Tensor | None

    def __init__(self, config: HtsatConfig, stage: int, index: int, lora_rank: int = 0, lora_alpha: float = 1.0) -> None:
        super().__init__()
        dim = config.dim(stage)
        self.grid, self.window = config.grid(stage), config.window_at(stage)
        self.shift = self.window // 2 if index % 2 and self.grid > self.window else 0
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, config.heads[stage], self.window, lora_rank, lora_alpha)
        self.mlp = Mlp(dim, config.mlp_ratio * dim)
        mask = torch.from_numpy(shift_mask(self.grid, self.window, self.shift))[:, 0] if self.shift else None
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, dim = x.shape
        y = self.norm1(x).view(batch, self.grid, self.grid, dim)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(y, self.window).view(-1, self.window**2, dim)
        windows, maps = self.attn(windows, self.attn_mask)
        y = window_reverse(windows.view(-1, self.window, self.window, dim), self.window, self.grid)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + y.view(batch, tokens, dim)
        return x + self.mlp(self.norm2(x)), maps


class PatchMerging(nn.Module):
    """[B, grid², C] → [B, grid² / 4, 2 C]: four strided slices, joined in the order (0,0), (1,0), (0,1), (1,1)."""

    def __init__(self, dim: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, dim = x.shape
        x = x.view(batch, self.grid, self.grid, dim)
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, dim=-1).view(batch, -1, 4 * dim)))


class Stage(nn.Module):
    """[B, grid², C] → the next stage's tokens, and the mean of the blocks' attention maps, which nobody uses."""

    def __init__(self, config: HtsatConfig, stage: int, lora_rank: int, lora_alpha: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(config, stage, j, lora_rank, lora_alpha) for j in range(config.depths[stage]))
        last = stage == len(config.depths) - 1
        self.downsample = None if last else PatchMerging(config.dim(stage), config.grid(stage))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = []
        for block in self.blocks:
            x, found = block(x)
            maps.append(found.unsqueeze(0))
        if self.downsample is not None:
            x = self.downsample(x)
        return x, torch.cat(maps, dim=0).mean(dim=0)


class PatchEmbed(nn.Module):
    """Image [B, 1, spec_size, spec_size] → tokens [B, grid², embed]."""

    def __init__(self, config: HtsatConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, config.embed, config.patch, config.patch)
        self.norm = nn.LayerNorm(config.embed)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).flatten(2).transpose(1, 2))


@dataclass
class Encoded:
    """Features F0 … F4 [B, tokens, C], the embedding [B, C], and what is computed for nothing: class scores and attention maps."""

    features: list[Tensor]
    embedding: Tensor
    framewise: Tensor
    clipwise: Tensor
    maps: list[Tensor]


class AudioBranch(nn.Module):
    """CLAP's HTSAT with its front end. `log_mel` then `encode`; the separator's copy has `lora_rank` > 0."""

    def __init__(self, config: HtsatConfig, front_end: ClapFrontEnd, lora_rank: int = 0, lora_alpha: float = 1.0) -> None:
        super().__init__()
        stages, last = len(config.depths), config.dim(len(config.depths) - 1)
        self.config, self.ratio = config, config.spec_size // config.n_mels
        self.spectrogram_extractor = Spectrogram(front_end.n_fft, front_end.hop)
        self.logmel_extractor = LogMel(front_end)
        self.bn0 = nn.BatchNorm2d(config.n_mels)
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(Stage(config, i, lora_rank, lora_alpha) for i in range(stages))
        self.norm = nn.LayerNorm(last)
        self.tscam_conv = nn.Conv2d(last, CLASSES, (config.grid(stages - 1) // self.ratio, 3), padding=(0, 1))
        self.head = nn.Linear(CLASSES, CLASSES)

    def log_mel(self, waveform: Tensor, *, pad: bool) -> Tensor:
        """[B, samples] at 48 kHz → dB [B, 1, frames, n_mels]; `pad` fills the power with zeros to the encoder's rows, before the log."""
        power = self.spectrogram_extractor(waveform)
        return self.logmel_extractor(F.pad(power, (0, 0, 0, self.config.frames - power.shape[2])) if pad else power)

    def image(self, x: Tensor) -> Tensor:
        """[B, 1, rows, n_mels] → [B, 1, spec_size, spec_size]: bicubic along time if rows lack, then chunks of time one below the other."""
        if x.shape[2] < self.config.frames:
            x = F.interpolate(x, (self.config.frames, x.shape[3]), mode="bicubic", align_corners=True)
        batch, _, frames, mels = x.shape
        x = x.permute(0, 1, 3, 2).contiguous().reshape(batch, 1, mels, self.ratio, frames // self.ratio)
        return x.permute(0, 1, 3, 2, 4).contiguous().reshape(batch, 1, mels * self.ratio, frames // self.ratio)

    def encode(self, log_mel: Tensor) -> Encoded:
        """dB [B, 1, rows, n_mels] → everything that the official forward makes of it."""
        x = self.image(self.bn0(log_mel.transpose(1, 3)).transpose(1, 3))
        features, maps = [self.patch_embed(x)], []
        for layer in self.layers:
            x, found = layer(features[-1])
            features.append(x)
            maps.append(found)
        return Encoded(features, *self._classify(self.norm(features[-1])), maps)

    def _classify(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, grid², C], regrouped to [B, C, mels, time] → embedding, framewise and clipwise scores."""
        batch, tokens, dim = x.shape
        grid = math.isqrt(tokens)
        x = x.permute(0, 2, 1).contiguous().reshape(batch, dim, self.ratio, grid // self.ratio, grid)
        x = x.permute(0, 1, 3, 2, 4).contiguous().reshape(batch, dim, grid // self.ratio, -1)
        scores = self.tscam_conv(x).flatten(2)
        framewise = scores.sigmoid().permute(0, 2, 1).contiguous().repeat_interleave(self.config.frames // scores.shape[2], dim=1)
        return x.flatten(2).mean(dim=2), framewise, self.head(scores.mean(dim=2)).sigmoid()
