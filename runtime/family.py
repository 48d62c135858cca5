"""What a model family must tell the runtime. The families themselves live in `families/`, one file each, found by name.

Every bundle has a graph `separator`. What it is asked reaches the graphs as a vector: as their input `condition`, or as their input `film`,
which the graph `film` makes of a condition once per query.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine
from . import families
from .dsp import Float32
from .errors import BundleError, ManifestError, QueryError
from .manifest import GraphEntry, Manifest

if TYPE_CHECKING:
    from .clap import ClapTowers
    from .query import Query

FILM = "film"
Embed = Callable[["Query"], Float32 | None]


@dataclass(frozen=True)
class Facts:
    """What `clapsep-export families` says of a family, in words.

    Attributes:
        title, paper: of the model.
        files: what a build takes.
        licence: of code and published weights.
        queries: their kinds and polarity.
        sample_rate: in Hz.
        causality: how much sound a result waits for.
        macs: multiply-adds.
    """

    title: str
    paper: str
    files: str
    licence: str
    queries: str
    sample_rate: int
    causality: str
    macs: str


class Family(ABC):
    """A family bound to the constants of one bundle.

    Attributes:
        signed: whether a negative query means anything.
        window_samples: of one window; for families without windows an excerpt longer than what a result depends on.
        condition_size: length of a condition vector.
        embedding_size: length of an embedding, of which conditions are made; the same but where a condition holds several.
        vectors: in words, what a query's vector is: "a vector of …".
        towers: what the query encoders take, None if the bundle has none.
    """

    facts: ClassVar[Facts]
    signed: ClassVar[bool] = False
    sample_rate: int
    window_samples: int
    condition_size: int
    vectors: str
    towers: ClapTowers | None = None

    @abstractmethod
    def __init__(self, manifest: Manifest) -> None:
        """Take the family's constants out of the manifest; raises ManifestError if one is missing or impossible."""

    def ask(self, positive: Query, negative: Query, embed: Embed, *, normalize: bool | None) -> Float32:
        """Queries, of which one may be empty → the condition vector [condition_size].

        `embed` gives the embedding of a query, its own vector or the towers', None for an empty one.

        Raises:
            QueryError: both are empty, or of a kind that the bundle does not take.
        """
        return self.condition(embed(positive), embed(negative), normalize=normalize)

    @abstractmethod
    def condition(self, positive: Float32 | None, negative: Float32 | None, *, normalize: bool | None) -> Float32:
        """Embeddings of the queries (None for a missing one) → the condition vector; `normalize` None is the bundle's rule.

        Raises:
            QueryError: both are None, or there is nothing to normalise.
        """

    @property
    def embedding_size(self) -> int:
        return self.condition_size


class WindowFamily(Family):
    """A family that separates windows of a fixed length."""

    @abstractmethod
    def features(self, windows: Float32) -> tuple[dict[str, Float32], Any]:
        """Windows [B, window_samples] → the separator graph's inputs but the condition, and what `reconstruct` needs."""

    @abstractmethod
    def reconstruct(self, maps: Mapping[str, NDArray[Any]], context: Any) -> Float32:
        """The separator graph's outputs → target windows [B, window_samples]."""

    def stages(self, windows: Float32, maps: Mapping[str, NDArray[Any]]) -> dict[str, Callable[[], object]]:
        """The signal processing in numpy, for benchmarks: each step as a call of its own, by its usual name, on given windows and maps."""
        _, context = self.features(windows)
        return {"features": lambda: self.features(windows), "reconstruct": lambda: self.reconstruct(maps, context)}


class Steps(ABC):
    """The state of one sound on its way through a causal model."""

    @abstractmethod
    def run(self, x: Float32, conditions: Float32, valid: int) -> Float32:
        """One step.

        Args:
            x: [channels, before + step + after].
            conditions: [K, condition_size], the same object while the queries stay the same.
            valid: of the step's samples, how many belong to the sound; fewer than `step` only at its end.

        Returns:
            [K, channels, step]
        """


class StepFamily(Family):
    """A causal family: a graph takes one step of the sound and its own state, and gives one step of the result.

    Attributes:
        step: samples that one step consumes and makes.
        before, after: samples before and after them that it also hears.
    """

    step: int
    before: int
    after: int

    @abstractmethod
    def begin(self, engine: Callable[[str], Engine], route: str, channels: int) -> Steps:
        """The state before the first step, by the graphs of a route (`fused` or `split`)."""


def unit(vector: Float32) -> Float32:
    """The vector at length 1; raises QueryError if it has none."""
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not norm:
        raise QueryError("the query's vector is zero, so it asks for nothing; give another one")
    return (vector / norm).astype(np.float32)


def family_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def family_class(name: str) -> type[Family]:
    """The family of a name out of `family_names`."""
    return importlib.import_module(f"{families.__name__}.{name}").FAMILY


def open_family(manifest: Manifest) -> Family:
    """The family that a manifest names, bound to its constants."""
    if manifest.family not in family_names():
        raise BundleError(f"the bundle is of family '{manifest.family}' and this version knows {family_names()}; upgrade clapsep-export")
    try:
        family = family_class(manifest.family)(manifest)
        _compare_films(family, manifest)
        return family
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(
            f"the manifest's constants do not describe a '{manifest.family}' model ({error}); build the bundle again"
        ) from error


def _compare_films(family: Family, manifest: Manifest) -> None:
    """What stands for the condition must be what the graph `film` makes of it."""
    graphs = manifest.graphs
    taken = {t.shape[1:] for name, graph in graphs.items() for t in graph.inputs if t.name == FILM}
    given = {t.shape[1:] for t in graphs[FILM].outputs} if FILM in graphs else set()
    asked = {t.shape[1:] for graph in graphs.values() for t in graph.inputs if t.name == "condition"}
    if taken != given or not asked <= {(family.condition_size,)}:
        raise ValueError(f"graphs take film {taken} and condition {asked}; there are film {given} and condition {family.condition_size}")


def compare_shapes(graphs: Mapping[str, GraphEntry], name: str, wanted: Mapping[str, tuple[int | str, ...]]) -> None:
    """Raises ValueError unless a bundle has the graph `name` with inputs and outputs of these sizes, the batch left out."""
    if name not in graphs:
        raise ValueError(f"there is no graph '{name}'")
    found = {t.name: t.shape[1:] for t in (*graphs[name].inputs, *graphs[name].outputs)}
    if found != wanted:
        raise ValueError(f"graph '{name}' has {found} where other graphs and the constants say {dict(wanted)}")
