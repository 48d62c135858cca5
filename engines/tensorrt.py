"""Engine kinds `tensorrt` and `tensorrt-rtx`: plans on an NVIDIA GPU, over what the two Python modules have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from numpy.typing import NDArray

from .engine import Arrays, Engine, EngineOptions
from .errors import EngineError, EngineUnavailable
from .machine import Machine, this_machine
from .plan import PlanSettings, Progress, Target
from .tensorrt_plan import Lane, OpenPlan


class TensorRtEngine(Engine):
    """A plan of TensorRT 10 or 11.

    Every concurrent caller has a `Lane` of its own. Lanes are kept in a pool, not per thread: there are as many as callers at once,
    however many threads come and go.
    """

    kind = "tensorrt"
    library = "tensorrt"
    install = "pip install 'clapsep-export[tensorrt]'"
    devices = ("cuda",)
    plans = "required"
    settings = frozenset({"compute_capabilities", "compatibility", "version_compatible", "workspace", "memory", "timing_cache"})
    title: ClassVar[str] = "TensorRT"

    _plan: OpenPlan | None = None

    def __init__(self, path: Path, options: EngineOptions) -> None:
        machine = this_machine()
        self.preflight(options, machine)  # before any TensorRT object is made: some versions crash without a driver
        self._replay, self._lock, self._idle = options.cuda_graph, Lock(), list[Lane]()
        self._plan = OpenPlan(self.load_library(), f"{self.title} {self.version()}", path, options.host_code)
        self.inputs, self.outputs, self.max_batch = self._plan.inputs, self._plan.outputs, self._plan.max_batch
        self.provider = f"{self.title} {self.version()} on {machine.gpus[0].name}"

    @classmethod
    def preflight(cls, options: EngineOptions, machine: Machine) -> None:
        super().preflight(options, machine)
        needed = cuda_major(cls.library)
        if machine.cuda is not None and needed is not None and _version(machine.cuda)[0] < needed:
            message = f"engine {cls.kind} is built for CUDA {needed} and the NVIDIA driver supports {machine.cuda}; update the driver"
            raise EngineUnavailable(message, "driver-too-old")

    @classmethod
    def check_plan(cls, target: Target, machine: Machine) -> None:
        """As in Engine; of several GPUs the first one counts, as it is the one that runs."""
        super().check_plan(target, machine)
        if target.cuda and machine.cuda and _version(machine.cuda)[0] < _version(target.cuda)[0]:
            message = f"the plan needs CUDA {target.cuda} and the NVIDIA driver supports {machine.cuda}"
            raise EngineUnavailable(message, "driver-too-old")
        own = machine.gpus[0].compute_capability if machine.gpus else ""
        newer = target.compatibility == "ampere-plus" and bool(own) and _version(own) >= (8, 0)
        if target.compute_capabilities and own not in target.compute_capabilities and not newer:
            there = "8.0 and newer" if target.compatibility == "ampere-plus" else " and ".join(target.compute_capabilities)
            here = f"this GPU, {machine.gpus[0].name}, has SM {own}" if own else "this machine has no GPU"
            message = f"the plan was compiled for GPUs with SM {there} and {here}"
            raise EngineUnavailable(message, "other-gpu")

    @classmethod
    def target(cls, settings: PlanSettings, machine: Machine) -> Target:
        cls.check_settings(settings)
        cls.preflight(EngineOptions(), machine)
        own = machine.gpus[0].compute_capability
        if settings.compute_capabilities not in ((), (own,)):
            asked = " and ".join(settings.compute_capabilities)
            raise EngineError(
                f"engine {cls.kind} compiles only for the GPU in the machine, here SM {own}, not for SM {asked}; compile there"
            )
        return cls._target((own,), settings, machine)

    @classmethod
    def _target(cls, capabilities: tuple[str, ...], settings: PlanSettings, machine: Machine) -> Target:
        major = cuda_major(cls.library)
        return Target(
            version=cls.version(),
            os=machine.os,
            architecture=machine.architecture,
            cuda=f"{major}.0" if major else "",
            compute_capabilities=capabilities,
            compatibility=settings.compatibility,
            version_compatible=settings.version_compatible,
        )

    @classmethod
    def compile(cls, model: Path, out: Path, settings: PlanSettings, progress: Progress) -> Target:
        from .tensorrt_builder import build  # which needs this file

        return build(cls.kind, model, out, settings, progress).target

    def close(self) -> None:
        """Free all memory; lanes that are running when it is called are freed when they end. Later runs are refused."""
        if self._plan is None:
            return
        with self._lock:
            self._plan = None
            idle, self._idle = self._idle, []
        for lane in idle:
            lane.close()

    def __del__(self) -> None:
        self.close()

    def _run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        with self._lane() as lane:
            return lane.run(inputs)

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        with self._lock:
            if self._plan is None:
                raise EngineError(f"this {self.kind} engine was closed; open the plan again")
            lane = self._idle.pop() if self._idle else Lane(self._plan, self._replay)
        try:
            yield lane
        except BaseException:
            lane.close()  # whatever state it is in, no other caller gets it
            raise
        with self._lock:
            if kept := self._plan is not None:
                self._idle.append(lane)
        if not kept:
            lane.close()


class TensorRtRtxEngine(TensorRtEngine):
    """A plan of TensorRT-RTX, which compiles for named compute capabilities with no GPU there, and generates kernels where it runs."""

    kind = "tensorrt-rtx"
    library = "tensorrt_rtx"
    install = "pip install 'clapsep-export[tensorrt-rtx]'"
    settings = frozenset({"compute_capabilities", "workspace", "memory"})
    title = "TensorRT-RTX"

    @classmethod
    def target(cls, settings: PlanSettings, machine: Machine) -> Target:
        cls.check_settings(settings)
        if not settings.compute_capabilities:  # whether the library takes the GPU at hand, it says itself
            return cls._target((cls._present(machine),), settings, machine)
        supported = cls.supported_capabilities()
        wrong = [f"'{c}'" for c in settings.compute_capabilities if c not in supported]
        if wrong:
            message = (
                f"engine {cls.kind} does not compile for compute capability {' and '.join(wrong)}; choose from: {', '.join(supported)}"
            )
            raise EngineError(message)
        return cls._target(tuple(c for c in supported if c in settings.compute_capabilities), settings, machine)

    @classmethod
    def supported_capabilities(cls) -> tuple[str, ...]:
        """Compute capabilities that the library compiles for, such as "8.9", oldest first."""
        names = [name[2:] for name in cls.load_library().ComputeCapability.__members__ if re.fullmatch(r"SM\d{2,}", name)]
        return tuple(sorted((f"{name[:-1]}.{name[-1]}" for name in names), key=_version))

    @classmethod
    def _present(cls, machine: Machine) -> str:
        try:
            cls.preflight(EngineOptions(), machine)
        except EngineUnavailable as error:
            if error.reason not in ("no-driver", "no-gpu"):
                raise
            message = f"{error}; to compile for other machines name their GPUs: --compute-capability 8.9"
            raise EngineUnavailable(message, error.reason) from error
        return machine.gpus[0].compute_capability


@cache
def cuda_major(library: str) -> int | None:
    """The major CUDA version that the installed `library` is built for, which its package's name says; None where it does not."""
    names = [re.fullmatch(rf"{library}[-_]cu(\d+)([-_]\w+)?", dist.name or "", re.IGNORECASE) for dist in distributions()]
    return min((int(name[1]) for name in names if name), default=None)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
