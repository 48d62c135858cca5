"""CLAP's query towers, shared by every family that is queried through CLAP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .dsp import Float32, mel_filterbank
from .family import compare_shapes
from .manifest import GraphEntry
from .mel import LogMel
from .rates import resample
from .stft import Stft

CROPS = ("start", "center", "loudest", "average")


@dataclass(frozen=True)
class ClapFrontEnd:
    """Constants of CLAP's log-mel front end and its rule for clips of another length.

    Rates in Hz, `clip_samples` at `sample_rate`, `hop` in samples.
    """

    sample_rate: int = 48000
    clip_samples: int = 480000
    n_fft: int = 1024
    hop: int = 480
    n_mels: int = 64
    fmin: float = 50.0
    fmax: float = 14000.0

    @property
    def frames(self) -> int:
        return self.clip_samples // self.hop + 1

    def log_mel(self, x: Float32, out: Float32 | None = None) -> Float32:
        """[..., samples] at `sample_rate` → [..., frames, n_mels] in dB, written to `out` if given."""
        return self._transform(x, out)

    @cached_property
    def _transform(self) -> LogMel:
        filters = mel_filterbank(self.sample_rate, self.n_fft, self.n_mels, self.fmin, self.fmax)
        return LogMel(Stft(self.n_fft, self.hop), filters)

    def clips(self, x: Float32, crop: str, *, int16: bool) -> Float32:
        """Bring a mono query at `sample_rate` to clips [k, clip_samples].

        Longer queries are cut by `crop`: the `start`, the `center`, the `loudest` stretch (on a grid of a tenth of a clip),
        or all consecutive stretches whose embeddings are then to be averaged (`average`). Shorter ones are repeated as often
        as they fit and filled with zeros. `int16` first takes the samples through 16-bit integers as CLAP's own loader does.
        """
        if int16:
            x = (np.clip(x, -1, 1) * np.float32(32767)).astype(np.int16).astype(np.float32) / np.float32(32767)
        return np.stack([self._repeat_pad(stretch) for stretch in self._cut(x, crop)])

    def _cut(self, x: Float32, crop: str) -> list[Float32]:
        size, surplus = self.clip_samples, len(x) - self.clip_samples
        if surplus <= 0:
            return [x]
        if crop == "average":
            return [x[i : i + size] for i in range(0, len(x) - size + 1, size)]
        starts = {"start": 0, "center": surplus // 2}
        begin = starts[crop] if crop in starts else self._loudest(x, surplus)
        return [x[begin : begin + size]]

    def _loudest(self, x: Float32, surplus: int) -> int:
        energy = np.concatenate([[0.0], np.cumsum(x.astype(np.float64) ** 2)])
        begins = np.arange(0, surplus + 1, self.clip_samples // 10)
        return int(begins[np.argmax(energy[begins + self.clip_samples] - energy[begins])])

    def _repeat_pad(self, x: Float32) -> Float32:
        out = np.zeros(self.clip_samples, np.float32)
        repeated = np.tile(x, self.clip_samples // len(x))
        out[: len(repeated)] = repeated
        return out


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


@dataclass(frozen=True)
class ClapTowers:
    """What a bundle's graphs `text_encoder` and `audio_encoder` take, and the size of the embedding that they give."""

    front_end: ClapFrontEnd
    rule: QueryRule
    embedding_size: int

    def features(self, waveform: Float32, sample_rate: int, crop: str | None) -> Float32:
        """A mono query → inputs of the audio encoder [k, frames, n_mels]; the k embeddings are averaged."""
        at_rate = resample(waveform, sample_rate, self.front_end.sample_rate)
        return self.front_end.log_mel(self.front_end.clips(at_rate, crop or self.rule.crop, int16=self.rule.int16_round_trip))

    def compare(self, graphs: Mapping[str, GraphEntry]) -> None:
        """Raises ValueError if a bundle's graphs are not these towers."""
        text, clip, embedding = (self.rule.context,), (self.front_end.frames, self.front_end.n_mels), (self.embedding_size,)
        compare_shapes(graphs, "text_encoder", {"input_ids": text, "attention_mask": text, "embedding": embedding})
        compare_shapes(graphs, "audio_encoder", {"log_mel": clip, "embedding": embedding})
        short = graphs.get("text_encoder_short")
        if short is not None:
            tokens = short.inputs[0].shape[1:] if short.inputs else ()
            if not (len(tokens) == 1 and isinstance(tokens[0], int) and tokens[0] < self.rule.context):
                raise ValueError(f"graph 'text_encoder_short' is not a text encoder of fewer than {self.rule.context} tokens")
            compare_shapes(graphs, "text_encoder_short", {"input_ids": tokens, "attention_mask": tokens, "embedding": embedding})
