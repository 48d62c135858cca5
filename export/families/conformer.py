"""Conformer extractor (Saijo et al. 2024, "Leveraging Audio-Only Data for Text-Queried Target Sound Extraction").

No code and no weights are published, so nothing pins these definitions but the paper's text (sections III and IV-A; marked [P]) and, where
it is silent, the standard choices of Gulati et al. 2020 ([G]) and ours ([O]). A checkpoint's tensors have the names of `Extractor`'s state.

`Extractor` computes what the text says, term by term: it is the reference. `Separator` is what goes into the graph: the same function with
constants folded, for one number of frames. They share weights and no arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ...runtime.errors import CheckpointError
from ...runtime.families.conformer import ConformerDsp
from .. import torch_dsp
from ..checkpoint import DERIVED, WEIGHTS, Checkpoint, Problems, Tensors
from ..family import Model
from ..layers import LastAxisBatchNorm, freeze
from ..specs import Derived, GraphSpec
from ..waveform import from_waveform

FAMILY = "conformer"
SAMPLE_RATE = 32000  # Hz [P]
TYPICAL = {  # names and ranks
    "in_proj.weight": 2,
    "blocks.0.cond.gamma.weight": 2,
    "blocks.0.attn.q.weight": 2,
    "blocks.0.ff1.lin1.weight": 2,
    "blocks.0.conv.dw.weight": 3,
}

# What shapes do not tell, with its kind and default; a safetensors file may set it in its metadata.
HYPER: dict[str, tuple[type, Any]] = {
    "weights": (str, "checkpoint"),
    "window_samples": (int, 320000),
    "heads": (int, 4),
    "position": (str, "rel_pos"),
    "cond_residual": (bool, False),
}


@dataclass(frozen=True)
class ConformerConfig:
    """Sizes and choices; the defaults are the paper's, or standard where it is silent.

    position: `rel_pos` (Transformer-XL, [G]), `abs_sin` (sinusoids added once) or `none`. norm: in the convolution, `batch` [G] or `layer`.
    cond_residual: whether conditioning blocks are added to their input.
    """

    condition: int = 512
    bins: int = 513
    hidden: int = 256
    layers: int = 16
    ffn: int = 1024
    kernel: int = 31
    heads: int = 4
    position: str = "rel_pos"
    cond_residual: bool = False
    norm: str = "batch"

    def __post_init__(self) -> None:
        if not 0 < self.heads <= self.hidden or self.hidden % self.heads or self.hidden % 2 or self.kernel % 2 == 0 or self.layers < 1:
            raise ValueError(f"sizes do not fit together: {self}")
        for name, choices in {"position": ("rel_pos", "abs_sin", "none"), "norm": ("batch", "layer")}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r} and not one of {', '.join(choices)}")


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """Sine and cosine of m · 10000^(-2k / size) in turn, float64: [n] → [n, size] (Vaswani et al. 2017, section 3.5)."""
    angle = positions.double()[:, None] * 10000 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class CondBlock(nn.Module):
    """Linear, Swish, FiLM, Linear [P]; gamma carries no "+ 1" [O]. With weights near zero and gamma's bias near one at first [O]."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        size = config.hidden
        self.lin1, self.lin2 = nn.Linear(size, size), nn.Linear(size, size)
        self.gamma, self.beta = nn.Linear(config.condition, size), nn.Linear(config.condition, size)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        return self.lin2(self.gamma(condition)[:, None] * F.silu(self.lin1(h)) + self.beta(condition)[:, None])


class FeedForward(nn.Module):
    """LN, Linear, Swish, Linear; half of it is added, before and after attention and convolution [G]."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden)
        self.lin1, self.lin2 = nn.Linear(config.hidden, config.ffn), nn.Linear(config.ffn, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.silu(self.lin1(self.norm(x))))


class Attention(nn.Module):
    """Self-attention over all frames. With `rel_pos` the score of frames i and j is, scaled by 1 / sqrt(size of a head),

    (q_i + u) · k_j + (q_i + v) · (W_r R_{i-j})    (Dai et al. 2019, section 3.3)
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        size, self.heads, self.relative = config.hidden, config.heads, config.position == "rel_pos"
        self.norm = nn.LayerNorm(size)
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))
        if self.relative:
            self.pos = nn.Linear(size, size, bias=False)
            self.pos_u, self.pos_v = (nn.Parameter(torch.zeros(self.heads, size // self.heads)) for _ in range(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        z, n = self.norm(x), x.shape[1]
        q, k, v = (self._split(linear(z)) for linear in (self.q, self.k, self.v))
        if self.relative:
            encoding = sinusoids(torch.arange(1 - n, n), x.shape[2]).to(x.dtype)
            by_distance = (q + self.pos_v[:, None]) @ self._split(self.pos(encoding)[None]).mT  # [B, heads, n, 2 n - 1]
            i = torch.arange(n)
            scores = (q + self.pos_u[:, None]) @ k.mT + by_distance[:, :, i[:, None], i[:, None] - i + n - 1]
        else:
            scores = q @ k.mT
        weights = (scores / q.shape[3] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """LN, pointwise, GLU, depthwise over time, normalisation, Swish, pointwise [G]."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        size, kernel = config.hidden, config.kernel
        self.norm, self.bn = nn.LayerNorm(size), LastAxisBatchNorm(size) if config.norm == "batch" else nn.LayerNorm(size)
        self.pw1, self.pw2 = nn.Conv1d(size, 2 * size, 1), nn.Conv1d(size, size, 1)
        self.dw = nn.Conv1d(size, size, kernel, padding=kernel // 2, groups=size)

    def forward(self, x: Tensor) -> Tensor:
        z = self.dw(F.glu(self.pw1(self.norm(x).mT), dim=1))
        return self.pw2(F.silu(self.bn(z.mT)).mT).mT


class Block(nn.Module):
    """A conditioning block [P], and a Conformer encoder layer [G] after it."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.cond, self.residual = CondBlock(config), config.cond_residual
        self.ff1, self.ff2, self.attn, self.conv = FeedForward(config), FeedForward(config), Attention(config), Convolution(config)
        self.norm = nn.LayerNorm(config.hidden)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        x = self.cond(h, condition) + (h if self.residual else 0)
        x = x + 0.5 * self.ff1(x)
        x = x + self.attn(x)
        x = x + self.conv(x)
        return self.norm(x + 0.5 * self.ff2(x))


class Extractor(nn.Module):
    """magnitude [B, n, bins], condition [B, C] → mask [B, n, bins], for any n."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj, self.out_proj = nn.Linear(config.bins, config.hidden), nn.Linear(config.hidden, config.bins)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, magnitude: Tensor, condition: Tensor) -> Tensor:
        h = self.in_proj(magnitude)
        if self.config.position == "abs_sin":
            h = h + sinusoids(torch.arange(h.shape[1]), h.shape[2]).to(h.dtype)
        for block in self.blocks:
            h = block(h, condition)
        return self.out_proj(h).sigmoid()


def _double(*values: nn.Parameter | Tensor) -> list[Tensor]:
    """For folding, which would else add its own rounding."""
    return [value.detach().double() for value in values]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.float())
    if bias is not None:
        layer.bias = nn.Parameter(bias.float())
    return layer


class Film(nn.Linear):
    """condition [B, C] → what every conditioning block takes, [B, layers · 2 · hidden]: gamma, and beta behind the block's last Linear."""

    def __init__(self, extractor: Extractor) -> None:
        config = extractor.config
        super().__init__(config.condition, 2 * config.layers * config.hidden)
        weights, biases = [], []
        for block in extractor.blocks:
            cond: CondBlock = block.cond  # pyright: ignore[reportAssignmentType]
            w, b, beta, beta_bias = _double(cond.lin2.weight, cond.lin2.bias, cond.beta.weight, cond.beta.bias)
            weights += [*_double(cond.gamma.weight), w @ beta]
            biases += [*_double(cond.gamma.bias), w @ beta_bias + b]
        self.weight, self.bias = nn.Parameter(torch.cat(weights).float()), nn.Parameter(torch.cat(biases).float())


class FoldedFeedForward(nn.Module):
    """Half of a `FeedForward`."""

    def __init__(self, ff: FeedForward) -> None:
        super().__init__()
        self.norm, self.lin1 = ff.norm, ff.lin1
        self.lin2 = _linear(0.5 * ff.lin2.weight, 0.5 * ff.lin2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.silu(self.lin1(self.norm(x))))


class FoldedAttention(nn.Module):
    """`Attention` with its scale in the weights, and one product for q, k and v, which come out head by head.

    k's bias adds the same to all scores of a row, so it falls out of the softmax; v's is a part of the result's. Relative positions are a
    constant [heads, size, 2 n - 1], column c for i - j = n - 1 - c. In a row as long as all scores, the one of i and j lies at
    (2 n - 1) i + (n - 1 - i + j) = (n - 1) + (2 n - 2) i + j: beyond the first n - 1, they are the first columns of rows of 2 n - 2.
    """

    def __init__(self, attention: Attention, frames: int) -> None:
        super().__init__()
        self.heads, self.frames, self.relative = attention.heads, frames, attention.relative
        width = attention.q.in_features
        self.size = width // self.heads
        scale = self.size**-0.5
        q, k, v, q_bias, v_bias = _double(attention.q.weight, attention.k.weight, attention.v.weight, attention.q.bias, attention.v.bias)
        out, out_bias = _double(attention.out.weight, attention.out.bias)
        self.norm, self.out = attention.norm, _linear(out, out_bias + out @ v_bias)
        self.qkv = nn.Parameter(torch.cat([q * scale, k, v]).unflatten(0, (3 * self.heads, self.size)).mT.float().contiguous())
        bias = q_bias.unflatten(0, (self.heads, 1, self.size))
        if not self.relative:
            self.content = nn.Parameter((bias * scale).float())
            return
        u, v, pos = _double(attention.pos_u, attention.pos_v, attention.pos.weight)
        encoded = sinusoids(torch.arange(frames - 1, -frames, -1), width) @ pos.mT
        self.content, self.position = (nn.Parameter(((bias + b[:, None]) * scale).float()) for b in (u, v))
        self.encoded = nn.Parameter(encoded.unflatten(1, (self.heads, self.size)).permute(1, 2, 0).float().contiguous())

    def _by_position(self, q: Tensor) -> Tensor:
        n = self.frames
        flat = ((q + self.position) @ self.encoded).flatten(2)[:, :, n - 1 : n - 1 + n * (2 * n - 2)]
        return flat.reshape(-1, self.heads, n, 2 * n - 2)[..., :n]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.norm(x)[:, None] @ self.qkv).split(self.heads, dim=1)
        scores = (q + self.content) @ k.mT
        if self.relative:
            scores = scores + self._by_position(q)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, self.frames, self.heads * self.size))


class FoldedConvolution(nn.Module):
    """`Convolution` with pointwise products of rows, and batch normalisation in the depthwise weights."""

    def __init__(self, conv: Convolution) -> None:
        super().__init__()
        self.norm = conv.norm
        self.pw1, self.pw2 = (_linear(pw.weight[:, :, 0], pw.bias) for pw in (conv.pw1, conv.pw2))  # pyright: ignore[reportArgumentType]
        size, kernel = len(conv.dw.weight), conv.dw.weight.shape[2]
        self.dw = nn.Conv1d(size, size, kernel, padding=kernel // 2, groups=size)
        weight, bias = _double(conv.dw.weight, conv.dw.bias)  # pyright: ignore[reportArgumentType]
        if isinstance(conv.bn, LastAxisBatchNorm):
            gain, offset, mean, variance = _double(conv.bn.weight, conv.bn.bias, conv.bn.running_mean, conv.bn.running_var)
            gain = gain * torch.rsqrt(variance + 1e-5)
            weight, bias = weight * gain[:, None, None], bias * gain + offset - mean * gain
        self.after = nn.Identity() if isinstance(conv.bn, LastAxisBatchNorm) else conv.bn
        self.dw.weight, self.dw.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())

    def forward(self, x: Tensor) -> Tensor:
        z = self.dw(F.glu(self.pw1(self.norm(x)), dim=-1).mT).mT
        return self.pw2(F.silu(self.after(z)))


class FoldedBlock(nn.Module):
    def __init__(self, block: Block, frames: int) -> None:
        super().__init__()
        self.residual, self.lin1, self.lin2 = block.residual, block.cond.lin1, _linear(block.cond.lin2.weight, None)
        self.ff1, self.ff2 = FoldedFeedForward(block.ff1), FoldedFeedForward(block.ff2)
        self.attn, self.conv, self.norm = FoldedAttention(block.attn, frames), FoldedConvolution(block.conv), block.norm

    def forward(self, h: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        x = self.lin2(gamma * F.silu(self.lin1(h))) + beta
        if self.residual:
            x = x + h
        for part in (self.ff1, self.attn, self.conv, self.ff2):
            x = x + part(x)
        return self.norm(x)


class Separator(nn.Module):
    """magnitude [B, frames, bins], film [B, layers · 2 · hidden] → mask [B, frames, bins]."""

    def __init__(self, extractor: Extractor, frames: int) -> None:
        super().__init__()
        self.config = config = extractor.config
        self.in_proj, self.out_proj = _linear(extractor.in_proj.weight, None), extractor.out_proj
        (bias,) = _double(extractor.in_proj.bias)
        if config.position == "abs_sin":
            bias = bias + sinusoids(torch.arange(frames), config.hidden)
        self.bias = nn.Parameter(bias.float())
        self.blocks = nn.ModuleList(FoldedBlock(block, frames) for block in extractor.blocks)  # pyright: ignore[reportArgumentType]

    def forward(self, magnitude: Tensor, film: Tensor) -> Tensor:
        parts = film[:, None].split(self.config.hidden, dim=-1)
        h = self.in_proj(magnitude) + self.bias
        for block, gamma, beta in zip(self.blocks, parts[::2], parts[1::2], strict=True):
            h = block(h, gamma, beta)
        return self.out_proj(h).sigmoid()


class ConformerModel(Model):
    """An extractor's checkpoint, ready to be exported."""

    family = FAMILY

    def __init__(self, extractor: Extractor, dsp: ConformerDsp, weights: str) -> None:
        self.extractor, self.film, self.separator = extractor, Film(extractor), Separator(extractor, dsp.frames)
        for module in (self.extractor, self.film, self.separator):
            freeze(module)
        self.signal, self.weights, self.config = dsp, weights, (config := extractor.config)
        choices = {name: getattr(config, name) for name in ("position", "norm", "cond_residual")}
        self.variant = {**choices, "definition": "by the paper's text; no published weights exist"}
        self.dsp = asdict(dsp)
        self.condition = {"size": config.condition, "normalize": True}
        self.query = {}

    def graphs(self) -> list[GraphSpec]:
        condition = torch.randn(2, self.config.condition)
        film = {"film": torch.randn(2, self.film.out_features)}
        return [
            GraphSpec("film", self.film, {"condition": condition}, ("film",)),
            GraphSpec("separator", self.separator, {"magnitude": self._example_map(), **film}, ("mask",)),
        ]

    def derived(self) -> list[Derived]:
        dsp = self.signal
        return [from_waveform(dsp.window_samples, dsp.n_fft, dsp.hop, ("mask",))]

    def _example_map(self) -> Tensor:
        return torch.rand(2, self.signal.frames, self.signal.bins)

    def conditions(self) -> NDArray[np.float32]:
        """Four unit vectors, the same every time."""
        vectors = np.random.default_rng(0).standard_normal((4, self.config.condition))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    @torch.inference_mode()
    def separate(self, mixture: NDArray[np.float32], condition: NDArray[np.float32]) -> NDArray[np.float32]:
        """Any length from n_fft / 2 + 1 samples on."""
        x, dsp = torch.from_numpy(mixture), self.signal
        spectrum = torch_dsp.stft(x, dsp.n_fft, dsp.hop)
        mask = self.extractor(spectrum.abs(), torch.from_numpy(condition).expand(len(x), -1))
        return torch_dsp.istft(spectrum * mask, dsp.n_fft, dsp.hop, x.shape[1]).numpy()


def recognises(checkpoint: Checkpoint) -> bool:
    return all(name in checkpoint.tensors and checkpoint.tensors[name].ndim == rank for name, rank in TYPICAL.items())


def hyper_parameters(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """What shapes do not tell, from the file's metadata where it has it; other keys are refused."""
    for name, value in metadata.items():
        if name not in HYPER or type(value) is not HYPER[name][0]:
            kinds = ", ".join(f"{name} ({kind.__name__})" for name, (kind, _) in HYPER.items())
            raise CheckpointError(f"the checkpoint's metadata has {name} = {value!r}; it may set {kinds}")
    values = {name: metadata.get(name, default) for name, (_, default) in HYPER.items()}
    if values["weights"] not in WEIGHTS:
        raise CheckpointError(f"the checkpoint's metadata has weights = {values['weights']!r}; they are one of {', '.join(WEIGHTS)}")
    bias = tensors.get("blocks.0.attn.pos_u")
    if bias is None and "position" not in metadata:
        raise CheckpointError("the checkpoint has no relative positions; say in its metadata whether position is abs_sin or none")
    if bias is not None and bias.ndim == 2:
        values["heads"] = metadata.get("heads", len(bias))
    return values


def infer_config(tensors: Tensors, hyper: Mapping[str, Any]) -> ConformerConfig:
    """Sizes of the model, from the shapes of its tensors and from what shapes do not tell."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    hidden, bins = shapes["in_proj.weight"]
    numbers = [int(m.group(1)) for name in tensors if (m := re.match(r"blocks\.(\d{1,3})\.", name))]
    return ConformerConfig(
        condition=shapes["blocks.0.cond.gamma.weight"][1],
        bins=bins,
        hidden=hidden,
        layers=max(numbers) + 1,
        ffn=shapes["blocks.0.ff1.lin1.weight"][0],
        kernel=shapes["blocks.0.conv.dw.weight"][2],
        norm="batch" if any("bn.running" in name for name in tensors) else "layer",
        **{name: hyper[name] for name in ("heads", "position", "cond_residual")},
    )


def open_model(clap: Checkpoint | None, checkpoint: Checkpoint) -> ConformerModel:
    """Read an extractor out of its file.

    Raises:
        CheckpointError: the file is wrong or does not fit the model, or a CLAP checkpoint was given too.
    """
    if clap is not None:
        raise CheckpointError("a Conformer extractor is asked with vectors and takes no CLAP towers; leave --clap out")
    if not recognises(checkpoint):
        raise CheckpointError(f"--checkpoint {checkpoint.source.name} has not the tensors {', '.join(TYPICAL)} of a Conformer extractor")
    tensors = {name: value for name, value in checkpoint.tensors.items() if not DERIVED.search(name)}
    hyper = hyper_parameters(checkpoint.metadata, tensors)
    try:
        config = infer_config(tensors, hyper)
        n_fft = 2 * (config.bins - 1)
        dsp = ConformerDsp(SAMPLE_RATE, hyper["window_samples"], n_fft, n_fft // 2)
        with torch.device("meta"):
            extractor = Extractor(config)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's sizes do not make a model ({error}); correct its tensors or its metadata") from error
    problems = Problems()
    taken = problems.take(tensors, extractor.state_dict(), "")
    problems.surplus([name for name in tensors if name not in extractor.state_dict()])
    problems.raise_if_any("the checkpoint")
    extractor.load_state_dict(taken, assign=True)
    return ConformerModel(extractor, dsp, hyper["weights"])
