"""Conformer extractor (Saijo et al. 2024, "Leveraging Audio-Only Data for Text-Queried Target Sound Extraction").

No code and no weights are published: the definition is the paper's text (sections III and IV-A) plus standard choices (Gulati et al. 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dsp import Complex, Float32
from ..errors import QueryError
from ..family import Facts, WindowFamily, compare_shapes, unit
from ..manifest import Manifest, decode
from ..stft import Stft

FRAMES = 1 << 13  # most that attention over all of them is built for; 131 s


@dataclass(frozen=True)
class ConformerDsp:
    """Constants of the transform, as the manifest's `dsp` holds them: Hz and samples (section IV-A: 32 ms windows, 16 ms hop)."""

    sample_rate: int
    window_samples: int
    n_fft: int
    hop: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate < 1 << 20 or not 2 <= self.hop == self.n_fft // 2 < 1 << 20 or self.n_fft % 2:
            raise ValueError(f"dsp sizes must be a sample rate and a hop of half of n_fft: {self}")
        if self.window_samples % self.hop or not 2 <= self.window_samples // self.hop < FRAMES:  # see Stft.inverse on a last part of a hop
            raise ValueError(f"a window must be of 2 to {FRAMES - 1} whole hops: {self}")

    @property
    def frames(self) -> int:
        return self.window_samples // self.hop + 1

    @property
    def bins(self) -> int:
        return self.n_fft // 2 + 1


@dataclass(frozen=True)
class ConditionRule:
    """Length of the condition, and whether unit norm is the default."""

    size: int
    normalize: bool


class Conformer(WindowFamily):
    """The extractor bound to one bundle's constants."""

    facts = Facts(
        title="Conformer extractor (no published weights)",
        paper="arXiv 2409.13152, whose text defines it",
        files="--checkpoint with tensors named as in export/families/conformer.py; nothing is published",
        licence="no official code or weights",
        queries="a vector (LAION-CLAP, 512 values, or MS-CLAP, 1024), positive only",
        sample_rate=32000,
        causality="windows of 10 s",
        macs="2.3 G per second (23.1 G per 10 s; 19.9 G without relative positions)",
    )

    def __init__(self, manifest: Manifest) -> None:
        self.dsp = dsp = decode(ConformerDsp, manifest.dsp, "dsp")
        self.rule = decode(ConditionRule, manifest.condition, "condition")
        self._stft = Stft(dsp.n_fft, dsp.hop)
        self.sample_rate, self.window_samples, self.condition_size = dsp.sample_rate, dsp.window_samples, self.rule.size
        self.vectors = f"a vector of {self.rule.size} values, a CLAP embedding"
        graphs = manifest.graphs
        film = {t.name: t.shape[1:] for t in graphs["film"].outputs}
        compare_shapes(graphs, "film", {"condition": (self.condition_size,), **film})
        compare_shapes(graphs, "separator", {"magnitude": (dsp.frames, dsp.bins), **film, "mask": (dsp.frames, dsp.bins)})
        if "separator_waveform" in graphs:
            window = (dsp.window_samples,)
            compare_shapes(graphs, "separator_waveform", {"mixture": window, **film, "target": window})

    def features(self, windows: Float32) -> tuple[dict[str, Float32], Complex]:
        """Linear magnitude, not normalised (section IV-A)."""
        spectrum = self._stft.forward(windows)
        return {"magnitude": np.abs(spectrum)}, spectrum

    def reconstruct(self, maps: Mapping[str, NDArray[Any]], context: Complex) -> Float32:
        """A real mask times the mixture's spectrum."""
        return self._stft.inverse(context, self.window_samples, maps["mask"])

    def condition(self, positive: Float32 | None, negative: Float32 | None, *, normalize: bool | None) -> Float32:
        """The embedding, of unit norm if `normalize` (section III: CLAP embeddings are)."""
        if positive is None or negative is not None:
            raise QueryError("a Conformer extractor takes one positive query and no negative one; say what to extract")
        return unit(positive) if (self.rule.normalize if normalize is None else normalize) else positive


FAMILY = Conformer
