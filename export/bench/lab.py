"""What every case needs: separators of each engine that is measured, and signals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from ...engines import KINDS, EngineOptions, engine_class, open_engine, this_machine
from ...runtime.bundle import Bundle
from ...runtime.dsp import Float32
from ...runtime.errors import InputError
from ...runtime.family import WindowFamily
from ...runtime.plans import choose, needs_gpu
from ...runtime.separator import Separator

WORDS = ("dog", "rain", "siren", "speech", "bell", "wind", "car", "bird", "music", "door", "water", "engine", "crowd", "thunder", "piano")
CLIP_RATE = 44100
SHORT_TEXT, LONG_TEXT = 3, 30  # words; some bundles have a graph of its own for short texts


@dataclass(frozen=True)
class Variant:
    """One way of running the graphs: an engine kind, and device and precision where they were asked for."""

    kind: str
    device: str | None = None
    precision: str | None = None

    @classmethod
    def parse(cls, text: str, device: str | None = None, precision: str | None = None) -> Variant:
        """`KIND`, or `KIND:cuda`, `KIND:bf16` in place of the `device` and `precision` that hold for all.

        Raises:
            InputError: what follows the kind is neither a device nor a precision.
        """
        kind, *rest = text.split(":")
        if kind not in KINDS:
            raise InputError(f"--engine {text} names no engine kind; choose one of: {', '.join(KINDS)}")
        chosen = {"device": device, "precision": precision}
        for word in rest:
            if word not in ("cpu", "cuda", "bf16"):
                raise InputError(f"--engine {text} says '{word}', no device or precision; write KIND, KIND:cuda or KIND:bf16")
            chosen["precision" if word == "bf16" else "device"] = word
        return cls(kind, **chosen)

    @property
    def options(self) -> EngineOptions:
        return EngineOptions(device=self.device, precision=self.precision)

    @property
    def on_gpu(self) -> bool:
        return engine_class(self.kind).device(self.options) == "cuda"

    def check(self, bundle: Bundle) -> None:
        """Raises EngineUnavailable if this cannot run the bundle here."""
        choose(bundle, self.kind, self.options, this_machine(needs_gpu(self.kind, self.options)))


_open_once = cache(open_engine)


class Sharing(Separator):
    """Separators of a benchmark that differ in route or batch only have their engines in common."""

    _open_file = staticmethod(_open_once)

    @staticmethod
    def forget() -> None:
        """Let the engines go with the separators that use them."""
        _open_once.cache_clear()


class Lab:
    """A bundle, the variants to measure, and signals that are the same in every run."""

    def __init__(self, bundle: Bundle, variants: tuple[Variant, ...]) -> None:
        self.bundle, self.variants = bundle, variants
        self.random = np.random.default_rng(0)
        self.family = self.separator(variants[0]).family
        self.rate, self.window = self.family.sample_rate, self.family.window_samples
        self.window_seconds = self.window / self.rate
        self.windowed = isinstance(self.family, WindowFamily)
        front_end = None if self.family.towers is None else self.family.towers.front_end
        self.clip_seconds = 0.0 if front_end is None else front_end.clip_samples / front_end.sample_rate  # 0: no audio queries

    def separator(self, variant: Variant, **options: Any) -> Separator:
        """A separator of a variant; graphs are loaded when they are first used."""
        return Sharing(self.bundle, variant.kind, device=variant.device, precision=variant.precision, **options)

    def separators(self, **options: Any) -> list[Separator]:
        """One separator of each variant."""
        return [self.separator(variant, **options) for variant in self.variants]

    def noise(self, samples: int) -> Float32:
        """A mixture [samples]."""
        return self.random.uniform(-0.3, 0.3, samples).astype(np.float32)

    def conditions(self, count: int) -> list[Float32]:
        """Conditions of length 1, as if of as many queries."""
        rows = self.random.standard_normal((count, self.family.condition_size))
        return [*(rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)]

    def texts(self, length: int = SHORT_TEXT) -> Iterator[str]:
        """Captions of `length` words, three at least, all different; of words that the model knows where it names them."""
        words = [str(word) for word in self.bundle.manifest.query.get("words") or WORDS]
        rest = [words[i % len(words)] for i in range(length - 3)]
        return (" ".join([*triple, *rest]) for triple in product(words, repeat=3))

    def clips(self) -> Iterator[tuple[Float32, int]]:
        """Audio queries as long as the model's own, all different."""
        clip = self.noise(round(self.clip_seconds * CLIP_RATE))
        for i in range(len(clip)):
            clip[i] = -clip[i]
            yield clip, CLIP_RATE
