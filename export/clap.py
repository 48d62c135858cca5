"""CLAP's two query towers (Wu et al. 2023): RoBERTa text encoder and HTSAT audio encoder into one 512-dimensional space.

Other families (AudioSep, USS) are queried by the same towers. Parameter names are those of the published checkpoint
without its `module.` prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .htsat import Htsat, HtsatConfig
from .layers import MASKED, attend

PAD = 1  # RoBERTa's <pad>; positions count from PAD + 1


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the RoBERTa text branch; the defaults are roberta-base."""

    vocab: int = 50265
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    positions: int = 514
    context: int = 77

    def __post_init__(self) -> None:
        if self.heads < 1 or self.layers < 1 or self.hidden % self.heads or self.positions < self.context + PAD + 1:
            raise ValueError(f"text encoder sizes do not fit together: {self}")


@dataclass(frozen=True)
class ClapConfig:
    text: TextConfig = field(default_factory=TextConfig)
    audio: HtsatConfig = field(default_factory=HtsatConfig)
    embedding: int = 512


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis (F.normalize would leave a Shape in the graph)."""
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)


def projection(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))


class RobertaEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab, config.hidden)
        self.position_embeddings = nn.Embedding(config.positions, config.hidden)
        self.token_type_embeddings = nn.Embedding(1, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden)

    def forward(self, ids: Tensor) -> Tensor:
        real = (ids != PAD).long()
        positions = real.cumsum(1) * real + PAD
        summed = self.word_embeddings(ids) + (self.position_embeddings(positions) + self.token_type_embeddings.weight[0])
        return self.LayerNorm(summed)


class DenseNorm(nn.Module):
    """LN(residual + dense(x))."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dense(x))


class SelfAttention(nn.Module):
    """RoBERTa's attention; its three projections are one product in the graph."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.heads, self.scale = heads, (hidden // heads) ** -0.5
        self.packed: nn.Linear | None = None

    def fold(self) -> None:
        if self.packed is None:
            parts = (self.query, self.key, self.value)
            factors = (self.scale, 1.0, 1.0)
            packed = nn.Linear(self.query.in_features, 3 * self.query.out_features)
            packed.weight = nn.Parameter(torch.cat([p.weight.detach() * f for p, f in zip(parts, factors, strict=True)]))
            packed.bias = nn.Parameter(torch.cat([p.bias.detach() * f for p, f in zip(parts, factors, strict=True)]))
            self.packed, self.scale = packed, 1.0
            del self.query, self.key, self.value

    def forward(self, x: Tensor, mask: Tensor, queries: int | None) -> Tensor:
        qkv = self.packed(x) if self.packed is not None else torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)
        return attend(qkv, self.heads, mask, self.scale, queries=queries)


class RobertaLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(config.hidden, config.heads), "output": DenseNorm(config.hidden, config.hidden)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden, config.ffn)})
        self.output = DenseNorm(config.ffn, config.hidden)

    def forward(self, x: Tensor, mask: Tensor, queries: int | None = None) -> Tensor:
        attended = self.attention["self"](x, mask, queries)
        x = self.attention["output"](attended, x if queries is None else x[:, :queries])
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class TextBranch(nn.Module):
    """RoBERTa up to the pooler: token ids [B, context] → [B, hidden]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = RobertaEmbeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(RobertaLayer(config) for _ in range(config.layers))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden, config.hidden)})

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = ((1 - attention_mask).float() * MASKED)[:, None, None, :]
        x = self.embeddings(ids)
        layers = list(self.encoder["layer"])  # pyright: ignore[reportArgumentType]
        for layer in layers[:-1]:
            x = layer(x, mask)
        x = layers[-1](x, mask, queries=1)  # only the first token is pooled
        return self.pooler["dense"](x[:, 0]).tanh()


class TextEncoder(nn.Module):
    """input_ids, attention_mask int64 [B, context] → text embedding [B, embedding], unit norm."""

    def __init__(self, config: ClapConfig) -> None:
        super().__init__()
        self.text_branch = TextBranch(config.text)
        self.text_projection = projection(config.text.hidden, config.embedding)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return unit(self.text_projection(self.text_branch(input_ids, attention_mask)))


def bicubic_matrix(rows: int, target: int) -> NDArray[np.float32]:
    """Bicubic interpolation of `rows` to `target` rows, align_corners, A = -0.75, as one matrix [target, rows]."""
    a = -0.75
    position = np.arange(target) * (rows - 1) / (target - 1)
    base = np.minimum(np.floor(position).astype(np.int64), rows - 1)
    matrix = np.zeros((target, rows))
    for offset in (-1, 0, 1, 2):
        d = np.abs(position - (base + offset))
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        weight = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
        np.add.at(matrix, (np.arange(target), np.clip(base + offset, 0, rows - 1)), weight)
    return matrix.astype(np.float32)


class AudioEncoder(nn.Module):
    """Log-mel in dB of a query clip, before bn0, [B, frames, n_mels] → audio embedding [B, embedding], unit norm."""

    resize: Tensor

    def __init__(self, config: ClapConfig, frames: int) -> None:
        super().__init__()
        self.audio_branch = Htsat(config.audio)
        self.audio_projection = projection(config.audio.dim(len(config.audio.depths) - 1), config.embedding)
        self.register_buffer("resize", torch.from_numpy(bicubic_matrix(frames, config.audio.frames)), persistent=False)

    def forward(self, log_mel: Tensor) -> Tensor:
        branch = self.audio_branch
        tokens = branch(self.resize @ branch.bn0(log_mel))[-1]
        pooled = tokens.mean(1) if branch.norm is None else branch.norm(tokens).mean(1)
        return unit(self.audio_projection(pooled))
