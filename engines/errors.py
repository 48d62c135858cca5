"""The root of the error hierarchy, and what can go wrong in an engine."""

from __future__ import annotations

from typing import Literal

Reason = Literal[
    "unknown-engine",  # no such engine kind
    "not-installed",  # its Python package is not there
    "not-loadable",  # the package is there and does not import
    "wrong-device",  # the kind does not run on that device
    "wrong-precision",  # the kind, or this processor, does not compute in that precision
    "no-driver",  # a GPU is needed and there is no NVIDIA driver
    "driver-too-old",  # the driver supports an older CUDA than the library needs
    "no-gpu",  # the driver sees no GPU
    "no-provider",  # this build of ONNX Runtime lacks the execution provider, or did not use it
    "no-plan",  # the bundle holds no plan for this engine kind and precision
    "other-version",  # the plan was compiled by another version of the library
    "other-gpu",  # the plan was compiled for other compute capabilities
    "other-cpu",  # the plan was compiled for a processor with other instructions
    "other-system",  # the plan was compiled for another operating system or architecture
]


class ClapsepError(Exception):
    """Anything that this package reports on purpose: one sentence with what was wrong, with what, and what to do."""

    exit_code = 1


class EngineError(ClapsepError):
    """An engine could not compile, load or run a graph."""


class EngineUnavailable(EngineError):
    """The engine that was asked for cannot run here, for `reason`; nothing else is tried in its place."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.exit_code = 2 if reason in ("unknown-engine", "wrong-device", "wrong-precision") else 1

    def __reduce__(self) -> tuple[type[EngineUnavailable], tuple[str, Reason]]:
        """Pickled whole, for worker processes."""
        return type(self), (str(self), self.reason)
