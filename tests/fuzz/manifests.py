"""Hostile manifests, alone and in a bundle that is opened and run; earlier benchmarks, which are JSON too."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
from clapsep.export.bench.result import read_result
from clapsep.runtime import Bundle, Separator
from clapsep.runtime.family import open_family
from clapsep.runtime.manifest import parse_manifest

from .mutators import damage, edit_json
from .target import sample_bundle, target, written

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "results" / "bench.json"


def _manifest() -> list[bytes]:
    return [(sample_bundle() / "manifest.json").read_bytes()]


@target(_manifest, edit_json, edit_json, edit_json, damage)
def manifest(data: bytes) -> None:
    """Read a manifest, bind its family, find its files."""
    parsed = parse_manifest(data, "manifest.json")
    parsed.to_json()
    for entry in parsed.files():
        Bundle(sample_bundle(), parsed).locate(entry)
    open_family(parsed)


@cache
def copied() -> Path:
    """A bundle of the target's own."""
    return Path(shutil.copytree(sample_bundle(), "copy.clapsep"))


@cache
def mixture() -> np.ndarray:
    return np.random.default_rng(3).uniform(-0.5, 0.5, 8000).astype(np.float32)


@target(_manifest, edit_json)
def bundle(data: bytes) -> None:
    """Open a bundle with an edited manifest, ask it in words and separate."""
    (copied() / "manifest.json").write_bytes(data)
    separator = Separator(copied(), threads=1)
    separator.separate(mixture(), 32000, "a dog barking")


@target(lambda: [BENCHMARK.read_bytes()], edit_json, edit_json, damage)
def benchmark(data: bytes) -> None:
    """Read an earlier benchmark."""
    read_result(written(data, "old.json"))
