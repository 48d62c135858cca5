"""CLAPSep's separator network (Ma et al. 2024, arXiv 2402.17455): tuned HTSAT encoder, FiLM decoder and mask net.

Parameter names are those of the published checkpoint. Section numbers refer to the paper where it is explicit about a
part; the mask nets below `MaskNet` share one place in the checkpoint, `decoder_model.mask_net`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.families.clapsep import ClapsepDsp
from .clap import ClapConfig
from .htsat import Htsat, HtsatConfig, SwinBlock, expand_index
from .layers import LastAxisBatchNorm, attend, fold_query_scale
from .waveform import FrontEnd, LogMel

SILENCE_DB = -100.0  # 10 log10(1e-10): what a row of zero power is in the log-mel


@dataclass(frozen=True)
class SeparatorConfig:
    """Sizes of the separator; the defaults are the published checkpoint."""

    clap: ClapConfig = field(default_factory=ClapConfig)
    depths: tuple[int, ...] = (1, 1, 1, 1)
    bins: int = 513
    attention: int = 640
    mask_layers: int = 3
    mask_heads: int = 8
    mask_ffn: int = 2560
    mask_net: str = "transformer"
    mask_kernel: int = 3
    phase: bool = False
    lora_rank: int = 16
    lora_alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.attention % self.mask_heads or len(self.depths) != len(self.clap.audio.depths):
            raise ValueError(f"separator sizes do not fit together: {self}")

    @property
    def condition(self) -> int:
        """Positive and negative embedding side by side."""
        return 2 * self.clap.embedding


class FilmCoefficients(nn.Module):
    def __init__(self, condition: int, dim: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Linear(condition, dim), nn.Linear(condition, dim)

    def forward(self, condition: Tensor) -> Tensor:
        return torch.cat([self.gamma(condition), self.beta(condition)], dim=-1)


class Film(nn.Module):
    """LN(gamma(c) · Linear(z) + beta(c) [+ h]) with one condition per row of the batch; gamma carries no "+ 1".

    `feature_proj` and `skip_conv` are called by the `Decoder`: one needs no condition, the other no mixture.
    """

    def __init__(self, condition: int, dim: int) -> None:
        super().__init__()
        self.skip_conv = FilmCoefficients(condition, dim)
        self.feature_proj, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, u: Tensor, gamma: Tensor, beta: Tensor, h: Tensor | None = None) -> Tensor:
        u = gamma * u + beta
        return self.norm(u if h is None else u + h)


class PatchExpand(nn.Module):
    """The inverse of PatchMerging: [B, grid², C] → [B, 4 grid², C / 2], in the window order of the finer grid."""

    index: Tensor

    def __init__(self, dim: int, grid: int, window: int, next_window: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Linear(dim, 2 * dim, bias=False), nn.LayerNorm(dim // 2)
        self.register_buffer("index", torch.from_numpy(expand_index(grid, window, next_window)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens, dim = x.shape[1:]
        return self.norm(self.expand(x).reshape(-1, 4 * tokens, dim // 2).index_select(1, self.index))


class DecoderStage(nn.Module):
    def __init__(self, config: HtsatConfig, stage: int, depth: int) -> None:
        super().__init__()
        grid, window = config.grid(stage), config.window_at(stage)
        coarsest = stage == len(config.depths) - 1
        self.downsample = (
            None if coarsest else PatchExpand(config.dim(stage + 1), config.grid(stage + 1), config.window_at(stage + 1), window)
        )
        self.blocks = nn.Sequential(
            *(
                SwinBlock(
                    config.dim(stage),
                    config.heads[stage],
                    grid,
                    window,
                    shifted=bool(j % 2),
                    mlp_ratio=config.mlp_ratio,
                )
                for j in range(depth)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x if self.downsample is None else self.downsample(x))


class InversePatchEmbed(nn.Module):
    """Tokens in window order [B, grid², embed] → log-mel-like rows [B, frames, n_mels].

    The transposed convolution does not overlap, so it is one product; unfolding the chunks of time is part of the same
    permutation that leaves window order (the mirror image of `PatchEmbed`).
    """

    def __init__(self, config: HtsatConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.embed)
        self.proj = nn.ConvTranspose2d(config.embed, 1, config.patch, config.patch)
        patch, window = config.patch, config.window_at(0)
        chunks, columns, rows = config.spec_size // config.n_mels, config.grid(0), config.n_mels // patch
        self.split = (chunks, rows // window, columns // window, window, window, patch, patch)
        self.shape = (config.frames, config.n_mels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) @ self.proj.weight.flatten(1) + self.proj.bias
        # axes: batch, chunk, mel window, time window, mel, time, mel in patch, time in patch
        return x.reshape(-1, *self.split).permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(-1, *self.shape)


class SelfAttention(nn.Module):
    """Packed multi-head attention with torch.nn.MultiheadAttention's parameter names."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * dim, dim)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def fold(self) -> None:
        if self.scale != 1.0:
            fold_query_scale(self.in_proj_weight, self.in_proj_bias, self.scale)
            self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(F.linear(x, self.in_proj_weight, self.in_proj_bias), self.heads, scale=self.scale))


class TransformerLayer(nn.Module):
    """Post-norm transformer encoder layer with ReLU, over all frames, without positional encoding."""

    def __init__(self, config: SeparatorConfig) -> None:
        super().__init__()
        dim = config.attention
        self.self_attn = SelfAttention(dim, config.mask_heads)
        self.linear1, self.linear2 = nn.Linear(dim, config.mask_ffn), nn.Linear(config.mask_ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class ConvLayer(nn.Module):
    """LN(x + ReLU(conv(x))) over time: the mask net without attention (our layout; no published checkpoint has one)."""

    def __init__(self, config: SeparatorConfig) -> None:
        super().__init__()
        dim = config.attention
        self.conv = nn.Conv1d(dim, dim, config.mask_kernel, padding=config.mask_kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.relu(self.conv(x.mT)).mT)


class MaskLayers(nn.Module):
    def __init__(self, config: SeparatorConfig) -> None:
        super().__init__()
        kind = {"transformer": TransformerLayer, "conv": ConvLayer}[config.mask_net]
        self.layers = nn.Sequential(*(kind(config) for _ in range(config.mask_layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MaskInput(nn.Linear):
    """Linear over spec_norm(magnitude) and the decoder's rows side by side, as two products: the first needs no condition."""

    left: Tensor
    right: Tensor

    def __init__(self, bins: int, n_mels: int, width: int) -> None:
        super().__init__(bins + n_mels, width)
        self.bins = bins

    def fold(self) -> None:
        """The two halves as constants of their own."""
        left, right = (part.detach().contiguous() for part in self.weight.split([self.bins, self.in_features - self.bins], dim=1))
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def fold_norm(self, norm: LastAxisBatchNorm) -> None:
        """Take the batch normalisation of the magnitude into the weights; in float64, as its scales differ widely."""
        scale, shift = (value.detach().double() for value in norm.coefficients())
        weight = self.weight.detach().double()
        self.bias = nn.Parameter((self.bias.detach().double() + weight[:, : self.bins] @ shift).float())
        weight[:, : self.bins] *= scale
        self.weight = nn.Parameter(weight.float())

    def spectrum(self, magnitude: Tensor) -> Tensor:
        weight = self.left if hasattr(self, "left") else self.weight[:, : self.bins]
        return F.linear(magnitude, weight, self.bias)

    def rows(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.right if hasattr(self, "right") else self.weight[:, self.bins :])


class Decoder(nn.Module):
    """FiLM decoder and mask net (paper section III-C), in three parts: what depends on the mixture, on the condition, on both."""

    def __init__(self, config: SeparatorConfig) -> None:
        super().__init__()
        audio, stages = config.clap.audio, len(config.clap.audio.depths)
        coarse_first = range(stages - 1, -1, -1)
        self.film = Film(config.condition, audio.dim(stages - 1))
        self.layers = nn.ModuleList(DecoderStage(audio, s, d) for s, d in zip(coarse_first, config.depths, strict=True))
        self.skip = nn.ModuleList(Film(config.condition, audio.dim(s)) for s in coarse_first)
        self.inverse_patch_embed = InversePatchEmbed(audio)
        self.spec_norm = LastAxisBatchNorm(config.bins)
        self.mask_net = nn.Sequential(
            MaskInput(config.bins, audio.n_mels, config.attention),
            nn.LayerNorm(config.attention),
            MaskLayers(config),
            nn.Linear(config.attention, config.bins * (3 if config.phase else 1)),
        )
        self.films: list[Film] = [self.film, *self.skip]  # pyright: ignore[reportAttributeAccessIssue]
        self.packed: nn.Linear | None = None

    def fold(self) -> None:
        """One product for all coefficients, and no separate normalisation of the magnitude."""
        if self.packed is not None:
            return
        linears = [linear for film in self.films for linear in (film.skip_conv.gamma, film.skip_conv.beta)]
        packed = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears))
        packed.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]))
        packed.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]))
        self.packed = packed
        self.mask_net[0].fold_norm(self.spec_norm)  # pyright: ignore[reportCallIssue]
        del self.spec_norm
        for film in self.films:
            del film.skip_conv

    def project(self, features: list[Tensor], magnitude: Tensor) -> list[Tensor]:
        """What the decoder takes from the mixture: projected features, coarsest first and its own twice, and the spectrum's part."""
        sources = [features[-1], *reversed(features[:-1])]
        spectrum = magnitude if self.packed is not None else self.spec_norm(magnitude)
        projected = [film.feature_proj(z) for film, z in zip(self.films, sources, strict=True)]
        return [*projected, self.mask_net[0].spectrum(spectrum)]  # pyright: ignore[reportCallIssue]

    def coefficients(self, condition: Tensor) -> Tensor:
        """[B, condition] → gamma and beta of every FiLM side by side, [B, 2 · sum of widths]."""
        if self.packed is not None:
            return self.packed(condition)
        return torch.cat([film.skip_conv(condition) for film in self.films], dim=-1)

    def forward(self, projected: list[Tensor], coefficients: Tensor) -> Tensor:
        """Mask logits [B, n, bins or 3 bins]."""
        widths = [film.norm.normalized_shape[0] for film in self.films for _ in range(2)]
        parts = coefficients[:, None].split(widths, dim=-1)
        h = self.film(projected[0], *parts[:2])
        for i, (layer, skip) in enumerate(zip(self.layers, self.skip, strict=True), 1):
            h = skip(projected[i], *parts[2 * i : 2 * i + 2], layer(h))
        spectrum = projected[-1]
        rows = self.inverse_patch_embed(h)[:, : spectrum.shape[1]]
        first, norm, layers, last = self.mask_net
        return last(layers(norm(spectrum + first.rows(rows))))  # pyright: ignore[reportCallIssue]


class Separator(nn.Module):
    """magnitude [B, n, bins], log_mel [B, n, n_mels] in dB, condition [B, 2 · embedding] → mask [B, n, bins] in [0, 1].

    n is at most `config.clap.audio.frames`. With `phase`, three maps: the mask, and the cosine and sine by which the
    mixture's phase is rotated (our reading of a three-part mask: sigmoid, and the direction of a tanh pair).
    """

    def __init__(self, config: SeparatorConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_branch = Htsat(config.clap.audio, config.lora_rank, config.lora_alpha, norm=False)
        self.decoder_model = Decoder(config)

    def encode(self, magnitude: Tensor, log_mel: Tensor) -> list[Tensor]:
        """Everything that needs no condition; see `Decoder.project`."""
        branch = self.audio_branch
        padded = F.pad(log_mel, (0, 0, 0, branch.config.frames - log_mel.shape[1]), value=SILENCE_DB)
        return self.decoder_model.project(branch(branch.bn0(padded)), magnitude)

    def maps(self, logits: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if not self.config.phase:
            return logits.sigmoid()
        mask, real, imag = logits.chunk(3, dim=-1)
        real, imag = real.tanh(), imag.tanh()
        size = (real.square() + imag.square()).sqrt().clamp_min(1e-10)
        return mask.sigmoid(), real / size, imag / size

    def forward(self, magnitude: Tensor, log_mel: Tensor, condition: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        coefficients = self.decoder_model.coefficients(condition)
        return self.maps(self.decoder_model(self.encode(magnitude, log_mel), coefficients))


class SeparatorInParts(nn.Module):
    """The separator, which also returns the values at which its graph can be cut: FiLM coefficients and features."""

    def __init__(self, separator: Separator) -> None:
        super().__init__()
        self.separator = separator

    def forward(self, magnitude: Tensor, log_mel: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        network = self.separator
        film, features = network.decoder_model.coefficients(condition), network.encode(magnitude, log_mel)
        maps = network.maps(network.decoder_model(features, film))
        return (*(maps if isinstance(maps, tuple) else (maps,)), film, *features)


class MelFrontEnd(nn.Module):
    """Mixture [B, window] → magnitude, log-mel, and the spectrum as `waveform` has it."""

    def __init__(self, dsp: ClapsepDsp) -> None:
        super().__init__()
        self.magnitude = FrontEnd(dsp.window_samples, dsp.n_fft, dsp.hop)
        self.log_mel = LogMel(dsp.window_samples, dsp.front_end)

    def forward(self, mixture: Tensor) -> tuple[Tensor, ...]:
        magnitude, spectrum = self.magnitude(mixture)
        return magnitude, self.log_mel(mixture), spectrum
