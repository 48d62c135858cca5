"""The interface that every engine kind implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a graph input or output; a string in `shape` is a symbolic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def accepts(self, value: NDArray[Any]) -> bool:
        """Whether dtype, rank and every fixed axis agree."""
        fits = all(isinstance(axis, str) or axis == size for axis, size in zip(self.shape, value.shape, strict=False))
        return value.dtype == np.dtype(self.dtype) and value.ndim == len(self.shape) and fits


@dataclass(frozen=True)
class EngineOptions:
    """How to run. `threads`: intra-op threads, None for one per physical core."""

    threads: int | None = None


class Engine(ABC):
    """One graph, ready to run. `provider` names what really executes it; `run` is safe to call from several threads."""

    kind: str
    provider: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Raises:
            EngineError: an input is missing, surplus, or not of the declared dtype and shape, or the engine failed.
        """
        self._check(inputs)
        return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Arrays) -> dict[str, NDArray[Any]]: ...

    def _check(self, inputs: Arrays) -> None:
        wanted = {spec.name: spec for spec in self.inputs}
        if set(inputs) != set(wanted):
            raise EngineError(f"the graph takes the inputs {sorted(wanted)}, not {sorted(inputs)}; pass exactly those")
        for name, value in inputs.items():
            spec = wanted[name]
            if not spec.accepts(value):
                given = f"{value.dtype} {list(value.shape)}"
                raise EngineError(f"input '{name}' must be {spec.dtype} {list(spec.shape)}, not {given}; convert or reshape it")
