"""Plans: what an engine kind compiles a graph into, for which target, and with which settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Progress = Callable[[str], None]
Compatibility = Literal["none", "ampere-plus", "same-compute-capability"]


@dataclass(frozen=True)
class Target:
    """What a plan runs on. Empty fields do not restrict.

    version: of the engine's library. cuda: CUDA version that the driver must support at least, such as "13.0".
    compute_capabilities: of the GPUs, such as "8.9". cpu: instructions that the processor must have.
    compatibility: TensorRT's hardware compatibility level. version_compatible: later libraries of the same major version run it too.
    """

    version: str
    os: str
    architecture: str
    cuda: str = ""
    compute_capabilities: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()
    compatibility: str = "none"
    version_compatible: bool = False

    def __str__(self) -> str:
        what = ", ".join([f"SM {c}" for c in self.compute_capabilities]) or " ".join(self.cpu) or self.architecture
        return f"{what} on {self.os}, library {self.version}"


@dataclass(frozen=True)
class PlanSettings:
    """How to compile. What differs from the defaults must be in the engine's `settings`.

    precision: what the plan computes in; empty for the graph's own, or `bf16` for OpenVINO. max_batch: batches 1 to N are planned for.
    compute_capabilities: GPUs to compile for, none for the one in this machine. workspace: bytes of GPU scratch memory, None for no limit.
    timing_cache: file in which TensorRT keeps its measurements from one compilation to the next.
    memory: bytes of host memory that the compiler may take, None for no limit.
    """

    precision: str = ""
    max_batch: int = 1
    compute_capabilities: tuple[str, ...] = ()
    compatibility: Compatibility = "none"
    version_compatible: bool = False
    workspace: int | None = None
    memory: int | None = None
    timing_cache: Path | None = None
