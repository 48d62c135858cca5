"""What a model family must tell the runtime. The families themselves live in `families/`, one file each, found by name."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from . import families
from .dsp import Float32
from .errors import BundleError, ManifestError
from .manifest import Manifest


class Family(ABC):
    """A family bound to the constants of one bundle."""

    sample_rate: int
    window_samples: int
    query_sample_rate: int
    query_samples: int
    embedding_size: int
    condition_size: int

    @abstractmethod
    def __init__(self, manifest: Manifest) -> None:
        """Take the family's constants out of the manifest; raises ManifestError if one is missing or impossible."""

    @abstractmethod
    def features(self, windows: Float32) -> tuple[dict[str, Float32], Any]:
        """Windows [B, window_samples] → the separator graph's inputs but the condition, and what `reconstruct` needs."""

    @abstractmethod
    def reconstruct(self, maps: Mapping[str, NDArray[Any]], context: Any) -> Float32:
        """The separator graph's outputs → target windows [B, window_samples]."""

    @abstractmethod
    def condition(self, positive: Float32 | None, negative: Float32 | None, *, normalize: bool | None) -> Float32:
        """Embeddings of the queries (None for a missing one) → the vector that the separator graph takes."""

    @abstractmethod
    def query_features(self, waveform: Float32, sample_rate: int, crop: str | None) -> Float32:
        """A mono query → inputs of the audio encoder [k, frames, n_mels]; the k embeddings are averaged."""

    def stages(self, windows: Float32, maps: Mapping[str, NDArray[Any]]) -> dict[str, Callable[[], object]]:
        """The signal processing in numpy, for benchmarks: each step as a call of its own, by its usual name, on given windows and maps."""
        _, context = self.features(windows)
        return {"features": lambda: self.features(windows), "reconstruct": lambda: self.reconstruct(maps, context)}


def family_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def open_family(manifest: Manifest) -> Family:
    """The family that a manifest names, bound to its constants."""
    if manifest.family not in family_names():
        raise BundleError(f"the bundle is of family '{manifest.family}' and this version knows {family_names()}; upgrade clapsep-export")
    module = importlib.import_module(f"{families.__name__}.{manifest.family}")
    try:
        return module.FAMILY(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(
            f"the manifest's constants do not describe a '{manifest.family}' model ({error}); build the bundle again"
        ) from error
