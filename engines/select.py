"""Open a graph with the engine kind that was asked for. There is no fallback from one kind to another."""

from __future__ import annotations

from pathlib import Path

from .engine import Engine, EngineOptions
from .errors import EngineUnavailable

KINDS = ("onnxruntime",)


def open_engine(kind: str, graph: Path, options: EngineOptions | None = None) -> Engine:
    """Load the ONNX file `graph` with engine `kind`.

    Raises:
        EngineUnavailable: `kind` is unknown, not installed, or would not run where it was asked to.
        EngineError: the graph cannot be loaded.
    """
    if kind == "onnxruntime":
        from .onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(graph, options or EngineOptions())
    raise EngineUnavailable(f"there is no engine kind '{kind}'; choose one of: {', '.join(KINDS)}")
