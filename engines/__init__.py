"""What it means to run one graph: one file per engine kind, one interface, one function that opens them."""

from .engine import Engine, EngineOptions, TensorSpec
from .errors import ClapsepError, EngineError, EngineUnavailable
from .select import KINDS, open_engine

__all__ = [
    "KINDS",
    "ClapsepError",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineUnavailable",
    "TensorSpec",
    "open_engine",
]
