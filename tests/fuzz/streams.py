"""Hostile use of a stream: blocks of any size, shape, type and content, in any order, with settings that fit or do not."""

from __future__ import annotations

import random
import struct
from functools import cache

import numpy as np
from clapsep.runtime import Separator
from clapsep.runtime.errors import AudioError, ClapsepError, StreamError

from .mutators import damage
from .target import sample_bundle, target

MOST = 4.0  # seconds of one input, so that it stays short
RATES = (1, 7, 8000, 11025, 16000, 32000, 44100, 48000, 192_000, 1_000_000, 0, -5)
SECONDS = (0.0, 1e-9, 0.1, 0.25, 1.0, 2.0, 2.5, 1e9, -1.0, float("nan"), float("inf"))
SIZES = (0, 1, 2, 3, 31, 32, 319, 320, 1000, 4096, 16_000, 65_537)
HEAD = struct.Struct("<BBBBB")  # rate, channels, hop, overlap, peak
BLOCK = struct.Struct("<BHB")  # size, seed, kind


@cache
def _separator() -> Separator:
    return Separator(sample_bundle(), threads=1)


def _seeds() -> list[bytes]:
    rng = random.Random(1)
    heads = [HEAD.pack(rate, channels, 4, 3, 4) for rate in (2, 5, 6, 7) for channels in (0, 1, 2)]
    return [head + b"".join(BLOCK.pack(rng.randrange(len(SIZES)), rng.randrange(1 << 16), 0) for _ in range(8)) for head in heads]


def _block(size: int, seed: int, kind: int, channels: int | None, rate: int) -> object:
    """Mostly sound; sometimes of another shape or type, or not finite, or no array at all."""
    samples = min(SIZES[size % len(SIZES)], int(MOST * rate))
    shape = (samples,) if channels is None else (channels, samples)
    x = np.random.default_rng(seed).uniform(-1.5, 1.5, shape)
    strange = {
        1: x.astype(np.float32),
        2: (x * 20_000).astype(np.int16),
        3: np.where(x > 1.4, np.nan, x),
        4: x * 1e300,
        5: x[..., None],
        6: x.astype(complex),
        7: "sound",
        8: None,
        9: x[..., ::-1],
        10: x.astype(object),
        11: x > 0,
        12: np.moveaxis(x, -1, 0),
    }
    return strange.get(kind, x)


@target(_seeds, damage, seconds=10)
def stream(data: bytes) -> None:
    """A stream gives back as many samples as it took, whatever came between."""
    rate, channels, hop, overlap, peak = HEAD.unpack_from(data.ljust(HEAD.size, b"\0"))
    given = None if channels == 0 else channels if channels < 70 else "two"
    opened = _separator().stream(
        "rain",
        sample_rate=RATES[rate % len(RATES)],
        channels=given,  # pyright: ignore[reportArgumentType]
        hop=SECONDS[hop % len(SECONDS)] if hop < 200 else None,
        overlap=SECONDS[overlap % len(SECONDS)],
        peak=SECONDS[peak % len(SECONDS)],
    )
    ready, refused = 0, 0
    for at in range(HEAD.size, len(data) - BLOCK.size + 1, BLOCK.size):
        block = _block(*BLOCK.unpack_from(data, at), given, opened.sample_rate)  # pyright: ignore[reportArgumentType]
        if opened.state.received * (given or 1) > MOST * opened.sample_rate:  # pyright: ignore[reportOperatorIssue]
            break
        try:
            ready += opened.push(block).shape[-1]  # pyright: ignore[reportArgumentType]
        except AudioError:
            refused += 1
    rest = opened.finish()
    assert np.isfinite(rest).all(), "results that are not finite"
    assert ready + rest.shape[-1] == opened.state.received == opened.state.returned, "samples were lost"
    try:
        opened.push(np.zeros(3))
    except (StreamError, AudioError):
        if refused:
            raise ClapsepError("some blocks were refused") from None
        return
    raise AssertionError("a finished stream took more")
