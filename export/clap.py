"""CLAP's two query towers (Wu et al. 2023): RoBERTa text encoder and HTSAT audio encoder into one 512-dimensional space.

Several families are queried by the same towers. Parameter names are those of the published checkpoint
without its `module.` prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.clap import ClapFrontEnd
from . import torch_dsp
from .checkpoint import DERIVED, Problems, Tensors, count_of, shape_of
from .htsat import Htsat, HtsatConfig
from .layers import MASKED, attend, freeze
from .specs import Derived, GraphSpec, Variant

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


# In the files, not in the towers: CLAP's classifier and the transforms that retrieval uses.
UNUSED = re.compile(r"^(audio_branch\.(tscam_conv|head)\.|(text|audio)_transform\.|logit_scale_[at]$|sink)")


def useful(tensors: Mapping[str, Tensor]) -> Tensors:
    """CLAP's tensors without what is derived from others or never used."""
    return {name: value for name, value in tensors.items() if not DERIVED.search(name) and not UNUSED.search(name)}


def clap_config(tensors: Tensors, sizes: Mapping[str, Any]) -> ClapConfig:
    """Sizes of the towers, from the shapes of their tensors and from `sizes`: spec_size, context, text_head_dim.

    Raises:
        CheckpointError: a tensor that tells a size is missing or has another rank.
        ValueError: they do not fit together.
    """
    return ClapConfig(
        text=_text_config(tensors, sizes["context"], sizes["text_head_dim"]),
        audio=_audio_config(tensors, sizes["spec_size"]),
        embedding=shape_of(tensors, "text_projection.2.weight", 2)[0],
    )


def _audio_config(clap: Tensors, spec_size: int) -> HtsatConfig:
    embed, _, patch, _ = shape_of(clap, "audio_branch.patch_embed.proj.weight", 4)
    stages = range(count_of(clap, "audio_branch.layers"))
    tables = [shape_of(clap, f"audio_branch.layers.{i}.blocks.0.attn.relative_position_bias_table", 2) for i in stages]
    hidden, _ = shape_of(clap, "audio_branch.layers.0.blocks.0.mlp.fc1.weight", 2)
    return HtsatConfig(
        spec_size=spec_size,
        n_mels=shape_of(clap, "audio_branch.bn0.weight", 1)[0],
        patch=patch,
        embed=embed,
        depths=tuple(count_of(clap, f"audio_branch.layers.{i}.blocks") for i in stages),
        heads=tuple(heads for _, heads in tables),
        window=(round(tables[0][0] ** 0.5) + 1) // 2,
        mlp_ratio=hidden // embed,
    )


def _text_config(clap: Tensors, context: int, head_dim: int) -> TextConfig:
    vocab, hidden = shape_of(clap, "text_branch.embeddings.word_embeddings.weight", 2)
    return TextConfig(
        vocab=vocab,
        hidden=hidden,
        layers=count_of(clap, "text_branch.encoder.layer"),
        heads=hidden // head_dim,
        ffn=shape_of(clap, "text_branch.encoder.layer.0.intermediate.dense.weight", 2)[0],
        positions=shape_of(clap, "text_branch.embeddings.position_embeddings.weight", 2)[0],
        context=context,
    )


class Towers:
    """CLAP's towers with their weights: the graphs `text_encoder` and `audio_encoder`, and the reference for audio queries.

    Args:
        config, tensors: as `clap_config` and `useful` give them.
        front_end: of the audio tower.
        int16: whether clips pass through 16-bit integers, as the family's own code has it.
        short: tokens of the graph for short texts.
        problems: where missing and mis-shaped tensors are noted.
    """

    def __init__(
        self, config: ClapConfig, tensors: Tensors, front_end: ClapFrontEnd, problems: Problems, *, int16: bool, short: int
    ) -> None:
        if front_end.frames > config.audio.frames:
            raise ValueError(f"{front_end.frames} frames do not fit into the encoder's {config.audio.frames}")
        self.config, self.front_end, self._int16, self._short = config, front_end, int16, short
        self.text, self.audio = TextEncoder(config), AudioEncoder(config, front_end.frames)
        for module in (self.text, self.audio):
            taken = problems.take(tensors, module.state_dict(), "CLAP: ")
            if not problems.lines:
                module.load_state_dict(taken)
        known = {**self.text.state_dict(), **self.audio.state_dict()}
        problems.surplus([f"CLAP: {name}" for name in tensors if name not in known])

    def freeze(self) -> None:
        """Fold constants; nothing is trained any more."""
        freeze(self.text)
        freeze(self.audio)

    @property
    def vocabulary(self) -> int:
        return self.config.text.vocab

    @property
    def query(self) -> dict[str, Any]:
        """The manifest's query rule."""
        return {"context": self.config.text.context, "crop": "start", "int16_round_trip": self._int16}

    def graphs(self) -> list[GraphSpec]:
        log_mel = torch.rand(2, self.front_end.frames, self.front_end.n_mels) * 60 - 80
        return [self._texts(self.config.text.context), GraphSpec("audio_encoder", self.audio, {"log_mel": log_mel}, ("embedding",))]

    def derived(self) -> list[Derived]:
        """Padding is masked, so short texts need not carry it."""
        short = Variant("text_encoder_short", "text_encoder", self._texts(self._short))
        return [short] if self.config.text.context > self._short else []

    def _texts(self, context: int) -> GraphSpec:
        ids = torch.full((2, context), PAD, dtype=torch.int64)
        ids[:, :3] = torch.tensor([0, 5, 2])
        return GraphSpec("text_encoder", self.text, {"input_ids": ids, "attention_mask": (ids != PAD).long()}, ("embedding",))

    @torch.inference_mode()
    def features(self, clip: NDArray[np.float32]) -> NDArray[np.float32]:
        """The audio tower's input [frames, n_mels] for a clip at its rate, no longer than its window, in PyTorch."""
        x = torch.from_numpy(clip)
        if self._int16:
            x = (x.clamp(-1, 1) * 32767).to(torch.int16).float() / 32767
        repeated = x.repeat(self.front_end.clip_samples // len(x))
        filled = nn.functional.pad(repeated, (0, self.front_end.clip_samples - len(repeated)))
        return torch_dsp.log_mel(filled[None].double(), self.front_end)[0].float().numpy()
