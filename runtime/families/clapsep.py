"""CLAPSep (Ma et al. 2024, arXiv 2402.17455): magnitude and log-mel in, magnitude mask out, positive and negative query."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..clap import CROPS, ClapFrontEnd
from ..dsp import Complex, Float32
from ..errors import QueryError
from ..family import Family
from ..manifest import GraphEntry, Manifest, decode
from ..rates import resample
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


@dataclass(frozen=True)
class QueryRule:
    """Token context, default crop policy, whether clips pass through 16-bit integers, and the words a small model knows."""

    context: int
    crop: str
    int16_round_trip: bool
    words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop must be one of {CROPS}")


Sizes = Mapping[str, tuple[int | str, ...]]  # of each input and output of a graph, without the batch


def _sizes(graphs: Mapping[str, GraphEntry]) -> dict[str, Sizes]:
    return {name: {t.name: t.shape[1:] for t in (*graph.inputs, *graph.outputs)} for name, graph in graphs.items()}


def _require(graph: str, found: Mapping[str, Sizes], wanted: Sizes) -> None:
    if found[graph] != wanted:
        raise ValueError(f"graph '{graph}' has {dict(found[graph])} where other graphs and the constants say {dict(wanted)}")


class Clapsep(Family):
    """CLAPSep bound to one bundle's constants."""

    def __init__(self, manifest: Manifest) -> None:
        missing = [f.name for f in fields(ClapsepDsp) if f.name not in manifest.dsp]
        if missing:  # the defaults are for making models, not for reading them
            raise ValueError(f"dsp lacks {', '.join(missing)}")
        self.dsp = decode(ClapsepDsp, manifest.dsp, "dsp")
        self.rule = decode(ConditionRule, manifest.condition, "condition")
        self.query = decode(QueryRule, manifest.query, "query")
        self.front_end = self.dsp.front_end
        self._stft = Stft(self.dsp.n_fft, self.dsp.hop)
        self.sample_rate, self.window_samples = self.dsp.sample_rate, self.dsp.window_samples
        self.query_sample_rate, self.query_samples = self.front_end.sample_rate, self.front_end.clip_samples
        self._resampled = Pool(partial(np.empty, self.query_samples, np.float32))
        self.embedding_size, self.condition_size = self.rule.embedding_size, 2 * self.rule.embedding_size
        self._compare_with_graphs(manifest)

    def _compare_with_graphs(self, manifest: Manifest) -> None:
        """Constants that do not describe the graphs would be found out late, or fill the memory first."""
        dsp, e = self.dsp, self.embedding_size
        expected = {
            "text_encoder": [(self.query.context,), (self.query.context,), (e,)],
            "audio_encoder": [(dsp.frames, dsp.n_mels), (e,)],
            "separator": [(dsp.frames, dsp.bins), (dsp.frames, dsp.n_mels), (2 * e,), (dsp.frames, dsp.bins)],
        }
        for name, shapes in expected.items():
            graph = manifest.graphs.get(name)
            if graph is None:
                raise ValueError(f"there is no graph '{name}'")
            found = [t.shape[1:] for t in (*graph.inputs, *graph.outputs)]
            if found[: len(shapes)] != shapes:
                raise ValueError(f"graph '{name}' has {found} where the constants say {shapes}")
        self._compare_graphs_with_each_other(manifest.graphs)

    def _compare_graphs_with_each_other(self, graphs: Mapping[str, GraphEntry]) -> None:
        """What one graph passes on to another, and what stands in for a graph of the contract, must be what it takes, or gives."""
        maps = graphs["separator"].outputs
        if [t.name for t in maps] not in (["mask"], ["mask", "mask_cos", "mask_sin"]) or len({t.shape for t in maps}) > 1:
            raise ValueError(f"graph 'separator' gives {[t.name for t in maps]} and not a mask, or a mask with its rotation")
        if "separator_waveform" in graphs:
            window, size = (self.window_samples,), (self.condition_size,)
            _require("separator_waveform", _sizes(graphs), {"mixture": window, "condition": size, "target": window})
        if "text_encoder_short" in graphs:
            self._check_short_texts(_sizes(graphs)["text_encoder_short"])
        if {"mixture_encoder", "film", "mask_decoder"} <= set(graphs):
            self._check_parts(graphs)

    def _check_short_texts(self, found: Sizes) -> None:
        (tokens,) = found.get("input_ids", ()) or (0,)
        if not isinstance(tokens, int) or not 0 < tokens < self.query.context:
            raise ValueError(f"graph 'text_encoder_short' is not a text encoder of fewer than {self.query.context} tokens")
        wanted = {"input_ids": (tokens,), "attention_mask": (tokens,), "embedding": (self.embedding_size,)}
        _require("text_encoder_short", {"text_encoder_short": found}, wanted)

    def _check_parts(self, graphs: Mapping[str, GraphEntry]) -> None:
        """The separator, cut in three."""
        separator, encoder, film = (graphs[name] for name in ("separator", "mixture_encoder", "film"))
        features, (width,) = {t.name: t.shape[1:] for t in encoder.outputs}, [t.shape[1:] for t in film.outputs]
        given = {t.name: t.shape[1:] for t in separator.inputs}
        maps = {t.name: t.shape[1:] for t in separator.outputs}
        condition = given.pop("condition")
        _require("mixture_encoder", _sizes(graphs), {**given, **features})
        _require("film", _sizes(graphs), {"condition": condition, "film": width})
        _require("mask_decoder", _sizes(graphs), {**features, "film": width, **maps})

    def features(self, windows: Float32) -> tuple[dict[str, Float32], Complex]:
        """Paper section III-A: magnitude at 32 kHz for the mask net, log-mel at 48 kHz for the encoder."""
        spectrum = self._stft.forward(windows)
        log_mel = np.empty((len(windows), self.dsp.frames, self.dsp.n_mels), np.float32)
        with self._resampled.borrow() as at_rate:
            for window, row in zip(windows, log_mel, strict=True):
                self.front_end.log_mel(resample_2_3(window, at_rate), row)
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
        empty = np.zeros(self.embedding_size, np.float32)
        joined = np.concatenate([empty if half is None else half for half in (positive, negative)])
        if self.rule.normalize if normalize is None else normalize:
            joined = joined / max(float(np.linalg.norm(joined)), 1e-12)
        return joined.astype(np.float32)

    def query_features(self, waveform: Float32, sample_rate: int, crop: str | None) -> Float32:
        at_rate = resample(waveform, sample_rate, self.front_end.sample_rate)
        return self.front_end.log_mel(self.front_end.clips(at_rate, crop or self.query.crop, int16=self.query.int16_round_trip))

    def stages(self, windows: Float32, maps: Mapping[str, NDArray[Any]]) -> dict[str, Callable[[], object]]:
        """STFT and log-mel are parts of `features`; ISTFT is all of `reconstruct`."""
        whole, at_rate = super().stages(windows, maps), resample_2_3(windows)
        stft, log_mel = partial(self._stft.forward, windows), partial(self.front_end.log_mel, at_rate)
        return {"features": whole["features"], "STFT": stft, "log-mel": log_mel, "ISTFT": whole["reconstruct"]}


FAMILY = Clapsep
