"""ResUNet30 (AudioSep: Liu et al. 2023, arXiv 2308.05037; USS: Kong et al. 2023, arXiv 2305.07447): magnitude in, mask and rotation out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..clap import ClapFrontEnd, ClapTowers, QueryRule
from ..dsp import Complex, Float32
from ..errors import QueryError
from ..family import FILM, Facts, WindowFamily, compare_shapes, unit
from ..manifest import Manifest, decode
from ..stft import Stft

MAPS = ("mask", "mask_cos", "mask_sin")
FLOOR = 1e-5  # smallest magnitude that the network sees; the published code limits the power to 1e-10
CLAP_SIZE = 512
VECTORS = {
    CLAP_SIZE: "a LAION-CLAP embedding of 512 numbers and length 1",
    527: "PANNs' probabilities of the 527 AudioSet classes, with 0 for those that are not wanted",
    2048: "a PANNs embedding of 2048 numbers",
}


@dataclass(frozen=True)
class ResunetDsp:
    """Constants of the separator's transform, as the manifest's `dsp` holds them; Hz and samples."""

    sample_rate: int = 32000
    window_samples: int = 320000
    n_fft: int = 2048
    hop: int = 320

    def __post_init__(self) -> None:
        sizes = (self.sample_rate, self.window_samples, self.n_fft, self.hop)
        if any(type(size) is not int or not 0 < size < 1 << 30 for size in sizes):
            raise ValueError(f"dsp sizes must be positive integers: {self}")
        if self.n_fft % 128 or self.hop > self.n_fft // 2 or self.window_samples <= self.n_fft:
            raise ValueError(f"dsp sizes do not fit together: {self}")

    @property
    def frames(self) -> int:
        return self.window_samples // self.hop + 1

    @property
    def bins(self) -> int:
        return self.n_fft // 2 + 1


@dataclass(frozen=True)
class ConditionRule:
    """Size of the condition, and whether embeddings are brought to length 1 before they become one."""

    size: int
    normalize: bool


class Resunet30(WindowFamily):
    """A ResUNet30 bound to one bundle's constants."""

    facts = Facts(
        title="ResUNet30 (AudioSep, USS)",
        paper="arXiv 2308.05037, arXiv 2305.07447",
        files="--checkpoint audiosep_base_4M_steps.ckpt, or USS's; --clap music_speech_audioset_epoch_15_esc_89.98.pt if it is not inside",
        licence="code MIT (AudioSep), Apache-2.0 (USS); weights as their publishers say",
        queries="text or audio (AudioSep), or a vector: CLAP 512, PANNs tags 527 or embedding 2048; positive only",
        sample_rate=32000,
        causality="windows of 10 s",
        macs="23.3 G per second of sound",
    )

    def __init__(self, manifest: Manifest) -> None:
        missing = [f.name for f in fields(ResunetDsp) if f.name not in manifest.dsp]
        if missing:  # the defaults are for making models, not for reading them
            raise ValueError(f"dsp lacks {', '.join(missing)}")
        self.dsp = decode(ResunetDsp, manifest.dsp, "dsp")
        self.rule = decode(ConditionRule, manifest.condition, "condition")
        self.sample_rate, self.window_samples = self.dsp.sample_rate, self.dsp.window_samples
        self.condition_size = self.rule.size
        self.vectors = VECTORS.get(self.rule.size, f"{self.rule.size} numbers of the kind that the model was trained with")
        if manifest.query:
            self.towers = ClapTowers(ClapFrontEnd(), decode(QueryRule, manifest.query, "query"), self.rule.size)
            self.towers.compare(manifest.graphs)
        self._stft = Stft(self.dsp.n_fft, self.dsp.hop)
        self._compare_with_graphs(manifest)

    def _compare_with_graphs(self, manifest: Manifest) -> None:
        """Constants that do not describe the graphs would be found out late, or fill the memory first."""
        film = next((t.shape[1:] for graph in manifest.graphs.values() for t in graph.outputs if t.name == FILM), ())
        grid, window = (self.dsp.frames, self.dsp.bins), (self.window_samples,)
        compare_shapes(manifest.graphs, FILM, {"condition": (self.condition_size,), FILM: film})
        compare_shapes(manifest.graphs, "separator", {"magnitude": grid, FILM: film, **dict.fromkeys(MAPS, grid)})
        if "separator_waveform" in manifest.graphs:
            compare_shapes(manifest.graphs, "separator_waveform", {"mixture": window, FILM: film, "target": window})

    def features(self, windows: Float32) -> tuple[dict[str, Float32], Complex]:
        """The magnitude of the mixture's spectrum, no smaller than 1e-5."""
        spectrum = self._stft.forward(windows)
        magnitude = np.abs(spectrum)
        return {"magnitude": np.maximum(magnitude, np.float32(FLOOR), out=magnitude)}, spectrum

    def reconstruct(self, maps: Mapping[str, NDArray[Any]], context: Complex) -> Float32:
        """Mask times the mixture's spectrum, its phase rotated.

        The published code multiplies the limited magnitude by spectrum / limited magnitude; the limit cancels.
        """
        return self._stft.inverse(context, self.window_samples, *(maps[name] for name in MAPS))

    def condition(self, positive: Float32 | None, negative: Float32 | None, *, normalize: bool | None) -> Float32:
        """The positive query's embedding, brought to length 1 unless told otherwise: CLAP's embeddings are, mixtures of them are not."""
        if negative is not None:
            raise QueryError("this model cannot be told what to remove; leave the negative query out and say what to extract")
        if positive is None:
            raise QueryError("no query was given; say what to extract")
        return unit(positive) if (self.rule.normalize if normalize is None else normalize) else positive

    def stages(self, windows: Float32, maps: Mapping[str, NDArray[Any]]) -> dict[str, Callable[[], object]]:
        """STFT is most of `features`; ISTFT is all of `reconstruct`."""
        whole = super().stages(windows, maps)
        return {"features": whole["features"], "STFT": partial(self._stft.forward, windows), "ISTFT": whole["reconstruct"]}


FAMILY = Resunet30
