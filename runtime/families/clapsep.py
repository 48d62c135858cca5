"""CLAPSep (Ma et al. 2024, arXiv 2402.17455): magnitude and log-mel in, magnitude mask out, positive and negative query."""

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
from ..family import Facts, WindowFamily, compare_shapes, unit
from ..manifest import GraphEntry, Manifest, decode
from ..resampler import resample_2_3
from ..scratch import Pool
from ..stft import Stft


@dataclass(frozen=True)
class ClapsepDsp:
    """Constants of the separator's own transform and of its CLAP front end, as the manifest's `dsp` holds them.

    The CLAP front end runs at 3/2 of `sample_rate` with 3/2 of `hop`, so both have the same frames.
    """

    sample_rate: int = 32000
    window_samples: int = 320000
    n_fft: int = 1024
    hop: int = 320
    mel_n_fft: int = 1024
    n_mels: int = 64
    fmin: float = 50.0
    fmax: float = 14000.0

    def __post_init__(self) -> None:
        sizes = (self.sample_rate, self.window_samples, self.n_fft, self.hop, self.mel_n_fft, self.n_mels)
        if any(type(size) is not int or not 0 < size < 1 << 30 for size in sizes):
            raise ValueError(f"dsp sizes must be positive integers: {self}")
        if (
            self.window_samples <= max(self.n_fft, self.mel_n_fft * 2 / 3)
            or self.hop % 2
            or self.sample_rate % 2
            or self.window_samples % 2
        ):
            raise ValueError(f"dsp sizes do not fit together: {self}")
        if not 0 <= self.fmin < self.fmax <= 0.75 * self.sample_rate:
            raise ValueError(f"dsp frequencies do not fit together: {self}")

    @property
    def frames(self) -> int:
        return self.window_samples // self.hop + 1

    @property
    def bins(self) -> int:
        return self.n_fft // 2 + 1

    @property
    def front_end(self) -> ClapFrontEnd:
        rate, samples, hop = (3 * size // 2 for size in (self.sample_rate, self.window_samples, self.hop))
        return ClapFrontEnd(rate, samples, self.mel_n_fft, hop, self.n_mels, self.fmin, self.fmax)


@dataclass(frozen=True)
class ConditionRule:
    """Sizes of an embedding and of the condition, and whether training's unit norm is the default."""

    embedding_size: int
    size: int
    normalize: bool


class Clapsep(WindowFamily):
    """CLAPSep bound to one bundle's constants."""

    facts = Facts(
        title="CLAPSep",
        paper="arXiv 2402.17455",
        files="--checkpoint best_model.ckpt with --clap music_audioset_epoch_15_esc_90.14.pt, or one raw training checkpoint",
        licence="no licence for the official code and weights; CLAP: CC0-1.0",
        queries="text and audio (CLAP, 512 values), positive and negative",
        sample_rate=32000,
        causality="windows of 10 s",
        macs="3.9 G per second (38.7 G per 10 s)",
    )
    signed = True

    def __init__(self, manifest: Manifest) -> None:
        missing = [f.name for f in fields(ClapsepDsp) if f.name not in manifest.dsp]
        if missing:  # the defaults are for making models, not for reading them
            raise ValueError(f"dsp lacks {', '.join(missing)}")
        self.dsp = decode(ClapsepDsp, manifest.dsp, "dsp")
        self.rule = decode(ConditionRule, manifest.condition, "condition")
        self._front_end = self.dsp.front_end
        self._stft = Stft(self.dsp.n_fft, self.dsp.hop)
        self.sample_rate, self.window_samples = self.dsp.sample_rate, self.dsp.window_samples
        self._resampled = Pool(partial(np.empty, self._front_end.clip_samples, np.float32))
        self.towers = ClapTowers(self._front_end, decode(QueryRule, manifest.query, "query"), self.rule.embedding_size)
        self.condition_size = 2 * self.rule.embedding_size
        self.vectors = f"a vector of {self.rule.embedding_size} values, a CLAP embedding"
        self.towers.compare(manifest.graphs)
        self._compare_with_graphs(manifest.graphs)

    @property
    def embedding_size(self) -> int:
        return self.rule.embedding_size

    def _compare_with_graphs(self, graphs: Mapping[str, GraphEntry]) -> None:
        """Constants that do not describe the graphs would be found out late, or fill the memory first."""
        dsp, condition = self.dsp, {"condition": (self.condition_size,)}
        features = {"magnitude": (dsp.frames, dsp.bins), "log_mel": (dsp.frames, dsp.n_mels)}
        names = [t.name for t in graphs["separator"].outputs]
        if names not in (["mask"], ["mask", "mask_cos", "mask_sin"]):
            raise ValueError(f"graph 'separator' gives {names} and not a mask, or a mask with its rotation")
        maps = dict.fromkeys(names, (dsp.frames, dsp.bins))
        compare_shapes(graphs, "separator", {**features, **condition, **maps})
        if "separator_waveform" in graphs:
            window = (self.window_samples,)
            compare_shapes(graphs, "separator_waveform", {"mixture": window, **condition, "target": window})
        if {"mixture_encoder", "film", "mask_decoder"} <= set(graphs):  # the separator, cut in three
            encoded, film = ({t.name: t.shape[1:] for t in graphs[name].outputs} for name in ("mixture_encoder", "film"))
            compare_shapes(graphs, "mixture_encoder", {**features, **encoded})
            compare_shapes(graphs, "film", {**condition, **film})
            compare_shapes(graphs, "mask_decoder", {**encoded, **film, **maps})

    def features(self, windows: Float32) -> tuple[dict[str, Float32], Complex]:
        """Paper section III-A: magnitude at 32 kHz for the mask net, log-mel at 48 kHz for the encoder."""
        spectrum = self._stft.forward(windows)
        log_mel = np.empty((len(windows), self.dsp.frames, self.dsp.n_mels), np.float32)
        with self._resampled.borrow() as at_rate:
            for window, row in zip(windows, log_mel, strict=True):
                self._front_end.log_mel(resample_2_3(window, at_rate), row)
        return {"magnitude": np.abs(spectrum), "log_mel": log_mel}, spectrum

    def reconstruct(self, maps: Mapping[str, NDArray[Any]], context: Complex) -> Float32:
        """Mask times the mixture's spectrum; three-part masks also rotate its phase."""
        mask = [maps[name] for name in ("mask", "mask_cos", "mask_sin") if name in maps]
        return self._stft.inverse(context, self.window_samples, *mask)

    def condition(self, positive: Float32 | None, negative: Float32 | None, *, normalize: bool | None) -> Float32:
        """Positive and negative embedding side by side, zeros for a missing one, as one unit vector if `normalize`.

        Training normalises (the default of published bundles); the paper's evaluation script does not.
        """
        if positive is None and negative is None:
            raise QueryError("neither a positive nor a negative query was given; say what to extract or what to remove")
        empty = np.zeros(self.rule.embedding_size, np.float32)
        joined = np.concatenate([empty if half is None else half for half in (positive, negative)])
        return unit(joined) if (self.rule.normalize if normalize is None else normalize) else joined.astype(np.float32)

    def stages(self, windows: Float32, maps: Mapping[str, NDArray[Any]]) -> dict[str, Callable[[], object]]:
        """STFT and log-mel are parts of `features`; ISTFT is all of `reconstruct`."""
        whole, at_rate = super().stages(windows, maps), resample_2_3(windows)
        stft, log_mel = partial(self._stft.forward, windows), partial(self._front_end.log_mel, at_rate)
        return {"features": whole["features"], "STFT": stft, "log-mel": log_mel, "ISTFT": whole["reconstruct"]}


FAMILY = Clapsep
