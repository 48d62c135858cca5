"""CLAP's front end for audio queries, shared by every family that is queried through CLAP."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .dsp import Float32, mel_filterbank
from .mel import LogMel
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
