"""The ways from windows and conditions to targets through a bundle's graphs, and which one to take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine
from .cache import Cache
from .dsp import Float32
from .errors import BundleError, EngineUnavailable, QueryError
from .family import Family

Maps = Mapping[str, NDArray[Any]]
CACHE_SIZE = 256  # FiLM coefficients; 24 kB each


class Route(ABC):
    """Runs a family's graphs; `engine` gives the engine of a graph by its name. Safe for several threads."""

    name: ClassVar[str]
    graphs: ClassVar[tuple[str, ...]]

    def __init__(self, family: Family, engine: Callable[[str], Engine]) -> None:
        self.family, self.engine = family, engine

    @abstractmethod
    def targets(self, windows: Float32, conditions: Float32) -> Float32:
        """Windows [B, window_samples] at the model's rate, conditions [K, condition] → targets [K, B, window_samples]."""


class MapRoute(Route):
    """Routes whose graphs end with maps: the signal processing is numpy's."""

    def targets(self, windows: Float32, conditions: Float32) -> Float32:
        inputs, context = self.family.features(windows)
        encoded = self.encode(inputs)
        return np.stack([self.family.reconstruct(self.decode(encoded, c), context) for c in conditions])

    @abstractmethod
    def encode(self, inputs: dict[str, Float32]) -> Maps:
        """What all queries on the same windows share."""

    @abstractmethod
    def decode(self, encoded: Maps, condition: Float32) -> Maps:
        """Maps [B, …] for one condition."""


class Fused(MapRoute):
    """One graph from features and condition to maps; K queries cost K times as much as one."""

    name, graphs = "fused", ("separator",)

    def encode(self, inputs: dict[str, Float32]) -> Maps:
        return inputs

    def decode(self, encoded: Maps, condition: Float32) -> Maps:
        return self.engine("separator").run({**encoded, "condition": _rows(condition, encoded)})


class Split(MapRoute):
    """The mixture is encoded once, whatever is asked of it, and a condition's FiLM coefficients are computed once."""

    name, graphs = "split", ("mixture_encoder", "film", "mask_decoder")

    def __init__(self, family: Family, engine: Callable[[str], Engine]) -> None:
        super().__init__(family, engine)
        self._films = Cache(CACHE_SIZE)

    def encode(self, inputs: dict[str, Float32]) -> Maps:
        return self.engine("mixture_encoder").run(inputs)

    def decode(self, encoded: Maps, condition: Float32) -> Maps:
        return self.engine("mask_decoder").run({**encoded, "film": _rows(self._film(condition), encoded)})

    def _film(self, condition: Float32) -> Float32:
        return self._films.get(condition.tobytes(), lambda: self.engine("film").run({"condition": condition[None]})["film"][0])


class Waveform(Route):
    """One graph from waveform to waveform; nothing is left for the host."""

    name, graphs = "waveform", ("separator_waveform",)

    def targets(self, windows: Float32, conditions: Float32) -> Float32:
        inputs = {"mixture": np.ascontiguousarray(windows)}
        engine = self.engine("separator_waveform")
        return np.stack([engine.run({**inputs, "condition": _rows(c, inputs)})["target"] for c in conditions])


ROUTES: dict[str, type[Route]] = {route.name: route for route in (Fused, Split, Waveform)}


def _rows(vector: Float32, inputs: Maps) -> Float32:
    """One row for each window of a batch."""
    batch = len(next(iter(inputs.values())))
    return np.ascontiguousarray(np.broadcast_to(vector, (batch, len(vector))))


def available(graphs: Collection[str]) -> list[str]:
    """The routes whose graphs are all there."""
    return [name for name, route in ROUTES.items() if set(route.graphs) <= set(graphs)]


def plan_routes(graphs: Collection[str], wanted: str | None, device: str, precision: str | None) -> tuple[str, str]:
    """The routes for one query and for several, of those that a bundle's graphs allow.

    On the CPU the split graphs cost as much as the fused one for a single query, and numpy's transforms less than matrix products
    (benchmarks/results/peers.json). On a GPU the transforms belong into the graph, so that only waveforms are copied.

    Raises:
        QueryError: there is no such route.
        EngineUnavailable: the waveform graph in a lowered precision, which would also lower its transforms.
        BundleError: the bundle lacks the graphs of the wanted route.
    """
    there = available(graphs)
    if wanted is not None:
        if not isinstance(wanted, str) or wanted not in ROUTES:
            raise QueryError(f"there is no route '{wanted}'; choose one of: {', '.join(ROUTES)}")
        if wanted not in there:
            raise BundleError(f"the bundle has no graphs for the route '{wanted}', only for {', '.join(there)}; build it again")
        if wanted == "waveform" and precision is not None:
            raise EngineUnavailable(
                f"the route waveform would compute its transforms in {precision}; leave the route or the precision out", "wrong-precision"
            )
        return wanted, wanted
    several = "split" if "split" in there else "fused"
    return ("waveform" if device == "cuda" and "waveform" in there else several), several
