"""The engine kinds, and opening a graph with the one that was asked for. There is no fallback from one kind to another."""

from __future__ import annotations

import importlib
from pathlib import Path

from .engine import Engine, EngineOptions
from .errors import EngineUnavailable
from .machine import this_machine

# kind: (file, class); each file imports its own library only when the kind is used.
_CLASSES = {
    "onnxruntime": ("onnxruntime", "OnnxRuntimeEngine"),
    "openvino": ("openvino", "OpenVinoEngine"),
    "tensorrt": ("tensorrt", "TensorRtEngine"),
    "tensorrt-rtx": ("tensorrt", "TensorRtRtxEngine"),
}
KINDS = tuple(_CLASSES)


def engine_class(kind: str) -> type[Engine]:
    """The class that implements an engine kind.

    Raises:
        EngineUnavailable: `kind` is unknown.
    """
    if kind not in _CLASSES:
        raise EngineUnavailable(f"there is no engine kind '{kind}'; choose one of: {', '.join(KINDS)}", "unknown-engine")
    file, name = _CLASSES[kind]
    return getattr(importlib.import_module(f"{__package__}.{file}"), name)


def open_engine(kind: str, path: Path, options: EngineOptions | None = None) -> Engine:
    """Open `path`, an ONNX file or a plan compiled from one, with engine `kind`.

    Raises:
        EngineUnavailable: `kind` is unknown, not installed, or would not run where it was asked to.
        EngineError: the file cannot be loaded.
    """
    options = options or EngineOptions()
    engine = engine_class(kind)
    engine.preflight(options, this_machine(gpus_too=engine.device(options) == "cuda"))
    return engine(path, options)
