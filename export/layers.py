"""Building blocks that the towers share: attention, LoRA, batch normalisation over the last axis.

Every module has two lives. As built it carries the checkpoint's own parameters under the checkpoint's own names, so that
it can be loaded and trained. `freeze` turns it into what goes into a graph: scales folded into weights, constants
gathered once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASKED = -1e3  # additive attention mask: exp() of it is exactly 0 in float32, and float16 holds it with room to spare


def attend(
    qkv: Tensor, heads: int, bias: Tensor | None = None, scale: float = 1.0, *, windows: int = 1, queries: int | None = None
) -> Tensor:
    """Multi-head attention over the second-last axis: [rows, n, 3 C] (q, k, v side by side) → [rows, queries or n, C].

    `bias` broadcasts to [rows, heads, n, n], or, where it differs between the windows of an image, is [windows · heads, n, n]
    for rows in groups of `windows`. With `queries` only that many leading positions are computed. One transpose packs all
    three and the products are four-dimensional: the form that every engine recognises, with the fewest TensorRT layers.
    """
    n, size = qkv.shape[1], qkv.shape[2] // 3 // heads
    if windows == 1:
        packed = qkv.reshape(-1, n, 3, heads, size).permute(2, 0, 3, 1, 4)
    else:
        packed = qkv.reshape(-1, windows, n, 3, heads, size).permute(3, 0, 1, 4, 2, 5).reshape(3, -1, windows * heads, n, size)
    q = packed[0] if queries is None else packed[0][:, :, :queries]
    scores = (q if scale == 1.0 else q * scale) @ packed[1].mT
    attended = (scores if bias is None else scores + bias).softmax(-1) @ packed[2]
    return attended.reshape(-1, heads, queries or n, size).transpose(1, 2).reshape(-1, queries or n, heads * size)


def fold_query_scale(weight: Tensor, bias: Tensor, scale: float) -> None:
    """Multiply the query rows of a packed [3 C, in] projection by `scale`, in place."""
    rows = weight.shape[0] // 3
    with torch.no_grad():
        weight[:rows] *= scale
        bias[:rows] *= scale


class LoRALinear(nn.Linear):
    """Linear layer with a low-rank update, y = x Wᵀ + b + alpha / rank · (x Aᵀ) Bᵀ (paper section III-B, loralib)."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        self.lora_A = nn.Parameter(torch.randn(rank, inputs) / rank**0.5)
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        self.scaling = alpha / rank

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.lora_A), self.lora_B) * self.scaling

    def merged(self) -> nn.Linear:
        """The same layer as a plain Linear, W + alpha / rank · B A, computed in float64."""
        plain = nn.Linear(self.in_features, self.out_features)
        update = self.lora_B.double() @ self.lora_A.double() * self.scaling
        plain.weight = nn.Parameter((self.weight.double() + update).float())
        plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain


def merge_lora(module: nn.Module) -> nn.Module:
    """Replace every `LoRALinear` below `module` by its merged Linear, in place; returns `module`."""
    for name, child in module.named_children():
        if isinstance(child, LoRALinear):
            setattr(module, name, child.merged())
        else:
            merge_lora(child)
    return module


def freeze(module: nn.Module) -> nn.Module:
    """Fold what is constant at inference in every sub-module that knows how; returns `module` in eval mode."""
    for child in module.modules():
        fold = getattr(child, "fold", None)
        if callable(fold):
            fold()
    return module.eval().requires_grad_(False)


class LastAxisBatchNorm(nn.Module):
    """Batch normalisation in eval form over the last axis: (x - mean) / sqrt(var + 1e-5) · weight + bias."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))
        self.affine: tuple[Tensor, Tensor] | None = None

    def coefficients(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * torch.rsqrt(self.running_var + 1e-5)
        return scale, self.bias - self.running_mean * scale

    def fold(self) -> None:
        scale, shift = (value.detach() for value in self.coefficients())
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.affine = (scale, shift)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine or self.coefficients()
        return x * scale + shift
