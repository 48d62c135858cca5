"""The interface that every engine kind implements."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError, EngineUnavailable
from .machine import Machine
from .plan import PlanSettings, Progress, Target

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a graph input or output; a string in `shape` is a symbolic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def checker(self) -> Callable[[NDArray[Any]], bool]:
        """Says whether an array's dtype, rank and every fixed axis agree; in little time, as causal models run a hundred times a second."""
        dtype, rank = np.dtype(self.dtype), len(self.shape)
        fixed = tuple((i, axis) for i, axis in enumerate(self.shape) if not isinstance(axis, str))
        tail = self.shape[1:] if [i for i, _ in fixed] == [*range(1, rank)] else None  # what nearly all tensors are: batch, fixed sizes

        def fits(value: NDArray[Any]) -> bool:
            shape = value.shape
            if value.dtype != dtype or len(shape) != rank:
                return False
            return shape[1:] == tail or (tail is None and all(shape[i] == axis for i, axis in fixed))

        return fits


@dataclass(frozen=True)
class EngineOptions:
    """How to run.

    threads: intra-op threads on the CPU, None for one per physical core.
    device: `cpu` or `cuda`, None for the engine kind's first.
    precision: what to compute in where that is not the graph's own (`bf16` on OpenVINO), None for the graph's.
    cuda_graph: capture the launches of each batch size once and replay them (TensorRT kinds).
    host_code: run the code for the host that version-compatible TensorRT plans bring; for plans that you trust as programs.
    """

    threads: int | None = None
    device: str | None = None
    precision: str | None = None
    cuda_graph: bool = True
    host_code: bool = False


class Engine(ABC):
    """One graph, ready to run. `provider` names what really executes it; `run` is safe to call from several threads.

    A subclass opens a file in `__init__(path, options)`: the ONNX file, or the plan that `compile` made of it.
    `max_batch` is the largest batch that one execution takes, None for any; `run` cuts larger ones.
    """

    kind: ClassVar[str]
    library: ClassVar[str]  # Python module
    install: ClassVar[str]  # the line that installs it
    devices: ClassVar[tuple[str, ...]]
    precisions: ClassVar[tuple[str, ...]] = ()  # that it computes in besides the graph's own
    plans: ClassVar[Literal["none", "optional", "required"]] = "none"
    plan_suffix: ClassVar[str] = ".plan"
    settings: ClassVar[frozenset[str]] = frozenset()  # of PlanSettings, besides precision and max_batch

    provider: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int | None = None

    @abstractmethod
    def __init__(self, path: Path, options: EngineOptions) -> None: ...

    @classmethod
    def load_library(cls) -> Any:
        """The engine's Python module.

        Raises:
            EngineUnavailable: not installed, or not loadable.
        """
        try:
            return importlib.import_module(cls.library)
        except ModuleNotFoundError as error:
            if error.name != cls.library:
                raise EngineUnavailable(
                    f"engine {cls.kind} does not load, as {error.name} is missing; run: {cls.install}", "not-loadable"
                ) from error
            raise EngineUnavailable(f"engine {cls.kind} is not installed; run: {cls.install}", "not-installed") from error
        except (ImportError, OSError, RuntimeError) as error:  # a shared library is missing, or is another version's
            raise EngineUnavailable(f"engine {cls.kind} does not load ({error}); run: clapsep-export doctor", "not-loadable") from error

    @classmethod
    def version(cls) -> str:
        """Of the engine's library, as plans record it."""
        return str(cls.load_library().__version__)

    @classmethod
    def preflight(cls, options: EngineOptions, machine: Machine) -> None:
        """Whether this kind can run on this machine at all, without opening a graph.

        Raises:
            EngineUnavailable: with the reason.
        """
        if options.device not in (None, *cls.devices):
            raise EngineUnavailable(
                f"engine {cls.kind} runs on {' or '.join(cls.devices)}, not on {options.device}; leave the device out", "wrong-device"
            )
        if options.precision not in (None, *cls.precisions):
            own = f"computes in {' or '.join(cls.precisions)} besides" if cls.precisions else "computes only in"
            message = f"engine {cls.kind} {own} the graph's own precision, not in {options.precision}; leave the precision out"
            raise EngineUnavailable(message, "wrong-precision")
        if find_spec(cls.library) is None:
            cls.load_library()  # which says so
        if cls.device(options) == "cuda":  # before the library is loaded: some touch the driver then
            _require_gpu(cls.kind, machine)
        cls.load_library()

    @classmethod
    def device(cls, options: EngineOptions) -> str:
        """`cpu` or `cuda`."""
        return options.device or cls.devices[0]

    @classmethod
    def check_plan(cls, target: Target, machine: Machine) -> None:
        """Whether a plan for `target` runs here, without opening it; `preflight` comes first.

        Raises:
            EngineUnavailable: with the reason.
        """
        if (target.os, target.architecture) != (machine.os, machine.architecture):
            here, there = f"{machine.os} {machine.architecture}", f"{target.os} {target.architecture}"
            raise EngineUnavailable(f"the plan was compiled for {there} and this is {here}", "other-system")
        installed = cls.version()
        if not (target.version == installed or (target.version_compatible and _compatible(target.version, installed))):
            raise EngineUnavailable(f"the plan was compiled by {cls.kind} {target.version} and this is {installed}", "other-version")

    @classmethod
    def target(cls, settings: PlanSettings, machine: Machine) -> Target:
        """What a plan that is compiled with `settings` on `machine` will run on.

        Raises:
            EngineUnavailable: the library, or the GPU to compile for, is not there.
            EngineError: `settings` ask for what this kind does not do.
        """
        cls.check_settings(settings)
        return Target(cls.version(), machine.os, machine.architecture)

    @classmethod
    def check_settings(cls, settings: PlanSettings) -> None:
        """Raises EngineError if this kind takes no plans, or not with these settings."""
        given = [f.name for f in fields(settings) if f.name not in ("precision", "max_batch") and getattr(settings, f.name) != f.default]
        unknown = [
            f"--{name.removesuffix('ies') + 'y' if name.endswith('ies') else name}".replace("_", "-")
            for name in given
            if name not in cls.settings
        ]
        if cls.plans == "none":
            raise EngineError(f"engine {cls.kind} runs the ONNX files themselves and takes no plans; there is nothing to compile")
        if unknown:
            raise EngineError(f"engine {cls.kind} has no {' and no '.join(unknown)}; leave it out")

    @classmethod
    def compile(cls, model: Path, out: Path, settings: PlanSettings, progress: Progress) -> Target:
        """Compile the ONNX file `model` into the plan `out`; returns what the plan runs on.

        Raises:
            EngineUnavailable: the library, or the GPU to compile for, is not there.
            EngineError: the compiler refused the graph or ran out of memory; `out` was not written.
        """
        raise NotImplementedError

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Returns:
            New arrays, which later runs leave alone.

        Raises:
            EngineError: an input is missing, surplus, or not of the declared dtype and shape, or the engine failed, or an output is
                not what the graph declares.
        """
        batch = self._check(inputs)
        if self.max_batch is None or batch <= self.max_batch:
            return self._require_outputs(self._run(inputs), batch)
        starts = range(0, batch, self.max_batch)
        parts = [self._run({name: value[i : i + self.max_batch] for name, value in inputs.items()}) for i in starts]
        return self._require_outputs({spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in self.outputs}, batch)

    def _require_outputs(self, outputs: dict[str, NDArray[Any]], batch: int) -> dict[str, NDArray[Any]]:
        """Engines take what a graph declares for a hint; callers take it for a fact."""
        for spec, fits in self._wanted_outputs:
            value = outputs[spec.name]
            if not fits(value) or value.shape[:1] != (batch,):
                found = f"{value.dtype} {list(value.shape)} for a batch of {batch}"
                raise EngineError(
                    f"output '{spec.name}' is {found} and the graph declares {spec.dtype} {list(spec.shape)}; build the bundle again"
                )
        return outputs

    @abstractmethod
    def _run(self, inputs: Arrays) -> dict[str, NDArray[Any]]: ...

    def _check(self, inputs: Arrays) -> int:
        """The batch size, once every input is known to be what the graph takes."""
        wanted = self._wanted_inputs
        if inputs.keys() != wanted.keys():
            raise EngineError(f"the graph takes the inputs {sorted(wanted)}, not {sorted(inputs)}; pass exactly those")
        for name, value in inputs.items():
            spec, fits = wanted[name]
            if not fits(value):
                given = f"{value.dtype} {list(value.shape)}"
                raise EngineError(f"input '{name}' must be {spec.dtype} {list(spec.shape)}, not {given}; convert or reshape it")
        sizes = {len(value) for value in inputs.values()}
        if len(sizes) != 1 or 0 in sizes:
            batches = {name: len(value) for name, value in inputs.items()}
            raise EngineError(f"the inputs have batches {batches}; give all of them the same number of rows, at least 1")
        return sizes.pop()

    @cached_property
    def _wanted_inputs(self) -> dict[str, tuple[TensorSpec, Callable[[NDArray[Any]], bool]]]:
        return {spec.name: (spec, spec.checker()) for spec in self.inputs}

    @cached_property
    def _wanted_outputs(self) -> list[tuple[TensorSpec, Callable[[NDArray[Any]], bool]]]:
        return [(spec, spec.checker()) for spec in self.outputs]


def _require_gpu(kind: str, machine: Machine) -> None:
    message = f"engine {kind} needs an NVIDIA GPU and {machine.trouble}; "
    if machine.blind:
        raise EngineUnavailable(message + "run: pip install cuda-python", "not-installed")
    if machine.cuda is None:
        raise EngineUnavailable(message + "install one, or choose an engine that runs on the CPU", "no-driver")
    if not machine.gpus:
        raise EngineUnavailable(message + "check CUDA_VISIBLE_DEVICES, or choose an engine that runs on the CPU", "no-gpu")


def _compatible(built: str, installed: str) -> bool:
    """A version-compatible plan runs with the same major version from its own version on."""
    old, new = ([int(part) for part in v.split(".") if part.isdigit()] for v in (built, installed))
    return old[:1] == new[:1] and new >= old
