"""Hostile audio files: damaged WAV, FLAC, OGG, Opus, MP3 and AIFF, read as mixtures and queries are."""

from __future__ import annotations

import io
import random

import numpy as np
import soundfile as sf
from clapsep.runtime.audiofile import read_audio, scan

from .mutators import NUMBERS, damage
from .target import target, written

KINDS = (
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAV", "ULAW"),
    ("WAV", "MS_ADPCM"),
    ("WAVEX", "PCM_24"),
    ("RF64", "PCM_16"),
    ("FLAC", "PCM_16"),
)
KINDS += (
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_16"),
    ("AIFF", "FLOAT"),
    ("CAF", "ALAC_16"),
    ("AU", "PCM_16"),
)
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".raw", ".opus", "", ".sd2", ".caf")


def _sounds() -> list[bytes]:
    """One file of each kind."""
    samples = np.random.default_rng(2).uniform(-0.5, 0.5, (2000, 2))
    files = []
    for kind, subtype in KINDS:
        out = io.BytesIO()
        sf.write(out, samples, 48000, format=kind, subtype=subtype)
        files.append(out.getvalue())
    return files


def edit_chunk(rng: random.Random, data: bytes) -> bytes:
    """Numbers of the first chunks changed, where sizes, rates and channels stand."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, size = rng.randrange(4, min(64, len(content))), rng.choice((1, 2, 4))
        content[at : at + size] = (rng.choice(NUMBERS) & ((1 << 8 * size) - 1)).to_bytes(size, rng.choice(("little", "big")))
    return bytes(content)


@target(_sounds, edit_chunk, damage)
def audio(data: bytes) -> None:
    """An audio file under one of several names, read as a mixture is, and as an example of a query is."""
    path = written(data, f"a{SUFFIXES[len(data) % len(SUFFIXES)]}")
    found = scan(path)
    samples, rate = read_audio(path)
    assert samples.shape == (found.channels, found.frames), f"{samples.shape} is not what was found before"
    assert (samples.dtype, rate) == (np.float32, found.sample_rate), f"{samples.dtype} samples at {rate} Hz"
    assert np.abs(samples).max() == np.float32(found.peak), "another peak"
    assert sum(block.shape[1] for block in found.blocks()) == found.frames, "blocks of another length"
