"""What a model family must tell the export. The families themselves live in `families/`, one file each, found by name."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from . import families
from .checkpoint import Checkpoint


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


class Model(ABC):
    """A checkpoint as frozen PyTorch modules: what a build exports, and the reference that the gates compare with."""

    family: str
    vocabulary: int
    weights: str
    variant: dict[str, Any]
    dsp: dict[str, Any]
    condition: dict[str, Any]
    query: dict[str, Any]

    @abstractmethod
    def graphs(self) -> list[GraphSpec]:
        """The graphs of a bundle."""

    def derived(self) -> list[Derived]:
        """Graphs that are made out of those; none by default."""
        return []

    @abstractmethod
    def query_features(self, clip: NDArray[np.float32]) -> NDArray[np.float32]:
        """The audio encoder's input [frames, n_mels] for a clip at its rate, no longer than its window, in PyTorch."""

    @abstractmethod
    def separate(self, mixture: NDArray[np.float32], condition: NDArray[np.float32]) -> NDArray[np.float32]:
        """The reference path in PyTorch from mixture [B, n] to target [B, n], DSP included."""


def open_model(clap: Checkpoint | None, checkpoint: Checkpoint) -> Model:
    """The model in a checkpoint, by the family that recognises it.

    Raises:
        CheckpointError: no family does, or the files do not fit.
    """
    modules = [importlib.import_module(f"{families.__name__}.{m.name}") for m in pkgutil.iter_modules(families.__path__)]
    for module in modules:
        if module.recognises(checkpoint):
            return module.open_model(clap, checkpoint)
    return modules[0].open_model(clap, checkpoint)  # which says what the file looks like instead
