"""Any sample rate into any other (soxr, HQ), at once or piece by piece."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .dsp import Float32

QUALITY = "HQ"


class Resampler:
    """Resamples [channels, n] that arrives in pieces; the results do not depend on the pieces.

    In all there are ceil(n · target / source) samples, so never none. Equal rates are passed through.
    """

    def __init__(self, source: int, target: int, channels: int) -> None:
        self._source, self._target, self._channels = source, target, channels
        self._received = self._returned = 0
        self._stream = None if source == target else _stream(source, target, channels)

    @property
    def delay(self) -> float:
        """Seconds that it holds back at most."""
        return 0.0 if self._stream is None else _delay(self._source, self._target)

    def push(self, x: Float32, *, last: bool = False) -> Float32:
        """The next samples [channels, n] → [channels, m]; with `last` also everything that was held back."""
        if self._stream is None:
            return x
        self._received += x.shape[1]
        y = self._stream.resample_chunk(np.ascontiguousarray(x.T), last=last).T
        left = -(-self._received * self._target // self._source) - self._returned
        y = fit_length(y, left) if last else y[:, :left]
        self._returned += y.shape[1]
        return np.ascontiguousarray(y)


def resample(x: Float32, source: int, target: int) -> Float32:
    """Resample [n] at once: ceil(n · target / source) samples."""
    return Resampler(source, target, 1).push(x[None], last=True)[0]


def fit_length(x: Float32, length: int) -> Float32:
    """Cut [..., n] or fill it up with zeros to [..., length]."""
    if x.shape[-1] >= length:
        return x[..., :length]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


def _stream(source: int, target: int, channels: int):  # noqa: ANN202 (soxr is loaded on first use)
    import soxr

    return soxr.ResampleStream(source, target, channels, dtype="float32", quality=QUALITY)


@lru_cache(maxsize=64)
def _delay(source: int, target: int) -> float:
    """By trial, on half a second of silence: soxr states its delay at a moment, not its largest."""
    stream, heard, given, delay = _stream(source, target, 1), 0, 0, 0.0
    block = np.zeros((max(1, source // 1000), 1), np.float32)
    while heard < source / 2:
        given += len(stream.resample_chunk(block))
        heard += len(block)
        delay = max(delay, heard / source - given / target)
    return delay
