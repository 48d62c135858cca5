"""Cut a waveform of any length into the model's windows and join the results without seams."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .dsp import Float32


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """First sample of each window: neighbours share at least `overlap` samples, the last window ends with the waveform."""
    if length <= window:
        return [0]
    return [*range(0, length - window, window - overlap), length - window]


def _batches(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def process_windows(
    x: Float32, window: int, overlap: int, process: Callable[[Float32], Float32], targets: int = 1, batch: int = 1
) -> Float32:
    """Run `process` ([B, window] → [targets, B, window]) over `x` [n] and join: [targets, n].

    A short waveform is filled up with zeros. Where two windows overlap, the second fades in over the middle `overlap`
    samples that they share, with weights sin² that sum to 1, and the outer edges of both are discarded.
    """
    length = len(x)
    if length < window:
        x = np.pad(x, (0, window - length))
    out = np.empty((targets, max(length, window)), np.float32)
    fade = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / max(overlap, 1)).astype(np.float32) ** 2
    done = 0  # end of what has been written so far
    for starts in _batches(window_starts(length, window, overlap), batch):
        processed = process(np.stack([x[s : s + window] for s in starts]))
        for i, start in enumerate(starts):
            target = processed[:, i]
            begin = start + (done - start - overlap) // 2 if start else 0
            mixed = begin + (overlap if start else 0)
            old, new = out[:, begin:mixed], target[:, begin - start : mixed - start]
            if start:
                out[:, begin:mixed] = old + fade * (new - old)
            out[:, mixed : start + window] = target[:, mixed - start :]
            done = start + window
    return out[:, :length]
