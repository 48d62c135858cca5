"""What it means to compile and run one graph: one file per engine kind, one interface, one function that opens them."""

from .engine import Engine, EngineOptions, TensorSpec
from .errors import ClapsepError, EngineError, EngineUnavailable
from .machine import Machine, this_machine, usable_processors
from .plan import PlanSettings, Target
from .select import KINDS, engine_class, open_engine

__all__ = [
    "KINDS",
    "ClapsepError",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineUnavailable",
    "Machine",
    "PlanSettings",
    "Target",
    "TensorSpec",
    "engine_class",
    "open_engine",
    "this_machine",
    "usable_processors",
]
