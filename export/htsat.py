"""HTSAT, the Swin transformer of CLAP's audio branch (Chen et al. 2022), laid out for export.

Tokens are kept in *window order* from the patch embedding to the last stage: the 64 tokens of an attention window lie
side by side. Attention without shift then needs no re-ordering at all, a shifted block needs one gather before and one
after, and every other operation is token-wise and does not care. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import LastAxisBatchNorm, LoRALinear, attend, fold_query_scale

Index = NDArray[np.int64]
BLOCKED = -100.0  # Swin's mask between regions that the cyclic shift brought together


@dataclass(frozen=True)
class HtsatConfig:
    """Sizes of an HTSAT encoder; the defaults are HTSAT-base as CLAP publishes it."""

    spec_size: int = 256
    n_mels: int = 64
    patch: int = 4
    embed: int = 128
    depths: tuple[int, ...] = (2, 2, 12, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 8
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        grid = self.spec_size // self.patch
        bad = (
            self.spec_size % self.n_mels
            or (self.n_mels // self.patch) % self.window
            or len(self.depths) != len(self.heads)
            or grid % 2 ** (len(self.depths) - 1)
        )
        if bad:
            raise ValueError(f"HTSAT sizes do not fit together: {self}")

    @property
    def frames(self) -> int:
        """Spectrogram rows that fill the square image: chunks of `spec_size` rows, one per `n_mels` image rows."""
        return self.spec_size * self.spec_size // self.n_mels

    def dim(self, stage: int) -> int:
        return self.embed * 2**stage

    def grid(self, stage: int) -> int:
        return self.spec_size // self.patch // 2**stage

    def window_at(self, stage: int) -> int:
        return min(self.window, self.grid(stage))


def window_order(grid: int, window: int) -> Index:
    """Raster index of each token, in window order."""
    n = grid // window
    return np.arange(grid * grid).reshape(n, window, n, window).transpose(0, 2, 1, 3).reshape(-1)


def _rank(grid: int, window: int) -> Index:
    return np.argsort(window_order(grid, window))


def shift_index(grid: int, window: int, shift: int) -> Index:
    """Gather index from window order to the window order of the grid rolled by (-shift, -shift)."""
    rolled = np.roll(np.arange(grid * grid).reshape(grid, grid), (-shift, -shift), (0, 1)).reshape(-1)
    return _rank(grid, window)[rolled[window_order(grid, window)]]


def _corners(grid: int, window: int) -> Index:
    """Raster indices, on a grid twice as fine, of the four children (i + 2 j) of each token in window order."""
    h, w = np.divmod(window_order(grid, window), grid)
    return np.stack([(2 * h + i) * 2 * grid + 2 * w + j for j in (0, 1) for i in (0, 1)], axis=1)


def merge_index(grid: int, window: int, next_window: int) -> Index:
    """Gather index that puts the four tokens which PatchMerging joins side by side."""
    return _rank(grid, window)[_corners(grid // 2, next_window).reshape(-1)]


def expand_index(grid: int, window: int, next_window: int) -> Index:
    """Gather index that sends the four parts of each token to the window order of the grid twice as fine."""
    source = np.argsort(_corners(grid, window).reshape(-1))
    return source[window_order(2 * grid, next_window)]


def relative_position_index(window: int) -> Index:
    """Row of the bias table for (query, key) inside a window: (dh + w - 1)(2w - 1) + dw + w - 1. [w², w²]"""
    h, w = np.divmod(np.arange(window * window), window)
    dh, dw = h[:, None] - h[None, :], w[:, None] - w[None, :]
    return (dh + window - 1) * (2 * window - 1) + dw + window - 1


def shift_mask(grid: int, window: int, shift: int) -> NDArray[np.float32]:
    """0 or -100 between the tokens of each shifted window. [windows, 1, w², w²]"""
    region = np.zeros(grid, np.int64)
    region[grid - window : grid - shift], region[grid - shift :] = 1, 2
    label = (3 * region[:, None] + region[None, :]).reshape(-1)[window_order(grid, window)].reshape(-1, window * window)
    blocked = label[:, None, :] != label[:, :, None]
    return np.where(blocked, np.float32(BLOCKED), np.float32(0))[:, None]


class WindowAttention(nn.Module):
    """Attention inside windows with relative position bias; tokens [B, windows · w², C] in (shifted) window order."""

    index: Tensor
    mask: Tensor | None
    bias: Tensor | None

    def __init__(self, dim: int, heads: int, grid: int, window: int, shift: int, lora_rank: int, lora_alpha: float) -> None:
        super().__init__()
        self.heads, self.tokens, self.windows = heads, window * window, (grid // window) ** 2
        self.scale = (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        if lora_rank:
            self.qkv: nn.Linear = LoRALinear(dim, 3 * dim, lora_rank, lora_alpha)
            self.proj: nn.Linear = LoRALinear(dim, dim, lora_rank, lora_alpha)
        else:
            self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        index = torch.from_numpy(relative_position_index(window))
        self.register_buffer("index", index, persistent=False)
        mask = torch.from_numpy(shift_mask(grid, window, shift)) if shift else None
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def position_bias(self) -> Tensor:
        """Relative position bias, plus the shift mask: [heads, w², w²] or [windows · heads, w², w²]."""
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
        return bias if self.mask is None else (bias + self.mask).flatten(0, 1)

    def fold(self) -> None:
        if self.bias is None:
            self.bias = self.position_bias().detach().contiguous()
            fold_query_scale(self.qkv.weight, self.qkv.bias, self.scale)
            self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        tokens, dim = x.shape[1:]
        qkv = self.qkv(x).reshape(-1, self.tokens, 3 * dim)
        bias = self.position_bias() if self.bias is None else self.bias
        windows = 1 if self.mask is None else self.windows
        return self.proj(attend(qkv, self.heads, bias, self.scale, windows=windows).reshape(-1, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """One Swin transformer block on tokens [B, grid², C] in window order."""

    there: Tensor | None
    back: Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: int,
        window: int,
        *,
        shifted: bool,
        mlp_ratio: int,
        lora_rank: int = 0,
        lora_alpha: float = 1.0,
    ) -> None:
        super().__init__()
        shift = window // 2 if shifted and grid > window else 0
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, grid, window, shift, lora_rank, lora_alpha)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        order = shift_index(grid, window, shift) if shift else None
        self.register_buffer("there", None if order is None else torch.from_numpy(order), persistent=False)
        self.register_buffer("back", None if order is None else torch.from_numpy(np.argsort(order)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.there is not None:
            y = y.index_select(1, self.there)
        y = self.attn(y)
        if self.back is not None:
            y = y.index_select(1, self.back)
        x = x + y
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Join 2 x 2 tokens, [B, grid², C] → [B, grid² / 4, 2 C], in the window order of the coarser grid."""

    index: Tensor

    def __init__(self, dim: int, grid: int, window: int, next_window: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.register_buffer("index", torch.from_numpy(merge_index(grid, window, next_window)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens, dim = x.shape[1:]
        return self.reduction(self.norm(x.index_select(1, self.index).reshape(-1, tokens // 4, 4 * dim)))


class PatchEmbed(nn.Module):
    """Fold the log-mel rows into chunks and embed 4 x 4 patches: [B, frames, n_mels] → [B, grid², embed], window order.

    The image has mel bins (one chunk of 2.56 s below the other) as rows and time as columns; a convolution whose stride
    equals its kernel is one matrix product, so fold, convolution and window order are a single permutation and product.
    """

    def __init__(self, config: HtsatConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, config.embed, config.patch, config.patch)
        self.norm = nn.LayerNorm(config.embed)
        patch, window = config.patch, config.window_at(0)
        chunks, columns, rows = config.spec_size // config.n_mels, config.grid(0), config.n_mels // patch
        self.split = (chunks, columns // window, window, patch, rows // window, window, patch)
        self.tokens = config.grid(0) ** 2

    def forward(self, x: Tensor) -> Tensor:
        # axes: batch, chunk, time window, time, time in patch, mel window, mel, mel in patch
        x = x.reshape(-1, *self.split).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(-1, self.tokens, self.proj.weight[0].numel())
        return self.norm(F.linear(x, self.proj.weight.flatten(1), self.proj.bias))


class Stage(nn.Module):
    def __init__(self, config: HtsatConfig, index: int, lora_rank: int, lora_alpha: float) -> None:
        super().__init__()
        dim, grid, window = config.dim(index), config.grid(index), config.window_at(index)
        self.blocks = nn.Sequential(
            *(
                SwinBlock(
                    dim,
                    config.heads[index],
                    grid,
                    window,
                    shifted=bool(j % 2),
                    mlp_ratio=config.mlp_ratio,
                    lora_rank=lora_rank,
                    lora_alpha=lora_alpha,
                )
                for j in range(config.depths[index])
            )
        )
        last = index == len(config.depths) - 1
        self.downsample = None if last else PatchMerging(dim, grid, window, config.window_at(index + 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class Htsat(nn.Module):
    """The encoder: log-mel in dB [B, frames, n_mels] → features F0 … F4, tokens in window order.

    `lora_rank` > 0 gives the separator's tuned copy (paper section III-B): LoRA on qkv and proj of every block.
    """

    def __init__(self, config: HtsatConfig, lora_rank: int = 0, lora_alpha: float = 1.0, *, norm: bool = True) -> None:
        super().__init__()
        self.config = config
        self.bn0 = LastAxisBatchNorm(config.n_mels)
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(Stage(config, i, lora_rank, lora_alpha) for i in range(len(config.depths)))
        self.norm = nn.LayerNorm(config.dim(len(config.depths) - 1)) if norm else None

    def forward(self, normalised: Tensor) -> list[Tensor]:
        """`normalised`: log-mel after bn0 and brought to `config.frames` rows."""
        features = [self.patch_embed(normalised)]
        for layer in self.layers:
            features.append(layer(features[-1]))
        return features
