"""The ways from windows and conditions to targets through a bundle's graphs, and which one to take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine
from .cache import Cache
from .dsp import Float32
from .errors import BundleError, EngineUnavailable, QueryError
from .family import FILM, Family, StepFamily, WindowFamily
from .manifest import GraphEntry
from .steps import Stepper

Maps = Mapping[str, NDArray[Any]]
CACHE_SIZE = 256  # FiLM coefficients; 24 kB each


class Route(ABC):
    """Runs a family's graphs. Safe for several threads."""

    name: ClassVar[str]
    graphs: ClassVar[tuple[str, ...]]  # and `film` where one of them takes it

    @abstractmethod
    def targets(self, windows: Float32, conditions: Float32) -> Float32:
        """Windows [B, window_samples] at the model's rate, conditions [K, condition] → targets [K, B, window_samples]."""


class WindowRoute(Route):
    """Routes of families with windows; a condition's FiLM coefficients are computed once."""

    def __init__(self, family: WindowFamily, engine: Callable[[str], Engine]) -> None:
        self.family, self.engine = family, engine
        self._films = Cache(CACHE_SIZE)

    def run(self, graph: str, inputs: Maps, condition: Float32) -> dict[str, NDArray[Any]]:
        """Run a graph that takes the condition, or its coefficients."""
        engine, batch = self.engine(graph), len(next(iter(inputs.values())))
        name, row = (FILM, self._film(condition)) if any(spec.name == FILM for spec in engine.inputs) else ("condition", condition)
        return engine.run({**inputs, name: np.ascontiguousarray(np.broadcast_to(row, (batch, len(row))))})

    def _film(self, condition: Float32) -> Float32:
        return self._films.get(condition.tobytes(), lambda: self.engine(FILM).run({"condition": condition[None]})[FILM][0])


class MapRoute(WindowRoute):
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
        return self.run("separator", encoded, condition)


class Split(MapRoute):
    """The mixture is encoded once, whatever is asked of it."""

    name, graphs = "split", ("mixture_encoder", "mask_decoder")

    def encode(self, inputs: dict[str, Float32]) -> Maps:
        return self.engine("mixture_encoder").run(inputs)

    def decode(self, encoded: Maps, condition: Float32) -> Maps:
        return self.run("mask_decoder", encoded, condition)


class Waveform(WindowRoute):
    """One graph from waveform to waveform; nothing is left for the host."""

    name, graphs = "waveform", ("separator_waveform",)

    def targets(self, windows: Float32, conditions: Float32) -> Float32:
        inputs = {"mixture": np.ascontiguousarray(windows)}
        return np.stack([self.run("separator_waveform", inputs, c)["target"] for c in conditions])


ROUTES: dict[str, type[WindowRoute]] = {route.name: route for route in (Fused, Split, Waveform)}


class StepRoute(Route):
    """A causal family's graphs, step by step: all in one (`fused`), or what queries share before what they do not (`split`)."""

    def __init__(self, name: str, family: StepFamily, engine: Callable[[str], Engine]) -> None:
        self._name, self._family, self._engine = name, family, engine

    def targets(self, windows: Float32, conditions: Float32) -> Float32:
        stepper = self.start(len(windows), conditions)
        return np.concatenate([stepper.push(windows), stepper.finish()], axis=2)

    def start(self, channels: int, conditions: Float32, slot: AbstractContextManager[object] | None = None) -> Stepper:
        """Take a sound of so many channels through the model from its beginning; `slot` is held during each step."""
        return Stepper(self._family, self._family.begin(self._engine, self._name, channels), channels, conditions, slot)


def open_route(name: str, family: Family, engine: Callable[[str], Engine]) -> Route:
    """A route through the graphs of a family; `engine` gives the engine of a graph by its name."""
    if isinstance(family, StepFamily):
        return StepRoute(name, family, engine)
    assert isinstance(family, WindowFamily)
    return ROUTES[name](family, engine)


def needs(route: str, graphs: Mapping[str, GraphEntry]) -> tuple[str, ...]:
    """The graphs that a route needs."""
    core = ROUTES[route].graphs
    return (FILM, *core) if any(spec.name == FILM for name in core for spec in graphs[name].inputs) else core


def available(graphs: Collection[str]) -> list[str]:
    """The routes whose graphs are all there."""
    return [name for name, route in ROUTES.items() if set(route.graphs) <= set(graphs)]


def plan_routes(
    graphs: Collection[str], wanted: str | None, device: str, precision: str | None, *, causal: bool = False
) -> tuple[str, str]:
    """The routes for one query and for several, of those that a bundle's graphs allow.

    On the CPU the split graphs cost as much as the fused one for a single query, and numpy's transforms less than matrix products
    (benchmarks/results/peers.json). In a causal model's steps a second call costs a few percent. On a GPU the transforms belong into the
    graph, so that only waveforms are copied.

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
    if causal:
        return "fused", several
    return ("waveform" if device == "cuda" and "waveform" in there else several), several
