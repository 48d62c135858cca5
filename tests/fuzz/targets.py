"""All targets, by name."""

from . import arrays, checkpoints, commands, graphs, manifests, sounds, tokenizers  # noqa: F401 - they register themselves
from .target import TARGETS, Target

__all__ = ["TARGETS", "Target"]
