"""The paper's loss, and what it means for a target of silence."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-3  # errors 30 dB below the reference count no further
TINY = 1e-8  # keeps the gradient finite where a whole mixture is silent
SILENT = 1e-6  # mean energy relative to the mixture's below which a target is silence


def decibels(ratio: Tensor) -> Tensor:
    return 10 * torch.log10(ratio)


def sdr(target: Tensor, estimate: Tensor) -> Tensor:
    """Soft-thresholded signal-to-distortion ratio of each row, at most 30 dB (paper Eq. 15)."""
    energy = target.square().sum(1)
    return decibels((energy + TINY) / ((target - estimate).square().sum(1) + FLOOR * energy + TINY))


def si_sdr(target: Tensor, estimate: Tensor) -> Tensor:
    """The same after projection of the estimate on the target (paper Eq. 16)."""
    scale = (target * estimate).sum(1, keepdim=True) / target.square().sum(1, keepdim=True).clamp_min(TINY)
    projected = scale * target
    energy = projected.square().sum(1)
    return decibels((energy + TINY) / ((projected - estimate).square().sum(1) + FLOOR * energy + TINY))


def separation_loss(target: Tensor, estimate: Tensor, mixture: Tensor) -> Tensor:
    """-0.9 SDR - 0.1 SI-SDR (paper section III-D); for a silent target what is left of the mixture, in dB, at least -30."""
    whole = mixture.square().sum(1)
    silent = target.square().sum(1) <= SILENT * whole
    left = decibels(estimate.square().sum(1) / whole.clamp_min(TINY) + FLOOR)
    distance = -0.9 * sdr(torch.where(silent[:, None], mixture, target), estimate)
    distance = distance - 0.1 * si_sdr(torch.where(silent[:, None], mixture, target), estimate)
    return torch.where(silent, left, distance).mean()
