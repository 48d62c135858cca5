"""Which graphs a model becomes, and how they are made out of each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class GraphSpec:
    """A module that becomes a graph: example inputs in order (batch 2), the names of inputs and outputs.

    `inner`: names for what the module returns after its outputs; values inside the graph, where other graphs are cut out of it.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    inner: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """A graph that is the part of graph `source` between the values `inputs` and `outputs`."""

    name: str
    source: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Wrap:
    """A graph that is `source` between two modules. What `before` and `source` return feeds, by name, what comes after it."""

    name: str
    source: str
    before: GraphSpec
    after: GraphSpec


@dataclass(frozen=True)
class Variant:
    """A graph that is the module of `source` traced with inputs of another size."""

    name: str
    source: str
    spec: GraphSpec


Derived = Cut | Wrap | Variant
