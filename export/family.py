"""What a model family must tell the export. The families themselves live in `families/`, one file each, found by name."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import CheckpointError, InputError
from ..runtime.family import family_class, family_names
from . import families
from .checkpoint import Checkpoint
from .clap import Towers
from .specs import Derived, GraphSpec

SHOWN = 6  # kinds of tensors that a message names


class Model(ABC):
    """A checkpoint as frozen PyTorch modules: what a build exports, and the reference that the gates compare with.

    Attributes:
        family: its name.
        weights: where they come from: `checkpoint`, `demo` or `generated`.
        variant, dsp, condition, query: constants, as the manifest holds them.
        towers: query towers, None if queries are vectors or labels.
    """

    family: str
    weights: str
    variant: dict[str, Any]
    dsp: dict[str, Any]
    condition: dict[str, Any]
    query: dict[str, Any]
    towers: Towers | None = None

    @abstractmethod
    def graphs(self) -> list[GraphSpec]:
        """The graphs of a bundle but the towers'."""

    def derived(self) -> list[Derived]:
        """Graphs that are made out of those; none by default."""
        return []

    @abstractmethod
    def separate(self, mixture: NDArray[np.float32], condition: NDArray[np.float32]) -> NDArray[np.float32]:
        """The reference path in PyTorch from mixture [B, n] to target [B, n], DSP included."""

    def conditions(self) -> NDArray[np.float32]:
        """Some conditions [q, condition_size] to try; for models without towers."""
        raise NotImplementedError


def open_model(clap: Checkpoint | None, checkpoint: Checkpoint, family: str | None = None) -> Model:
    """The model in a checkpoint, by the family that recognises it, or by the one that is named.

    Raises:
        InputError: there is no such family.
        CheckpointError: no family recognises the checkpoint, or the files do not fit.
    """
    if family is not None and family not in family_names():
        raise InputError(f"there is no family '{family}'; choose one of: {', '.join(family_names())}")
    if clap is not None and (seen := describe_tensors(clap.tensors)) != "a CLAP checkpoint":
        titles = [family_class(name).facts.title for name in recognising(clap)]
        seen, hint = (f"a checkpoint of {titles[0]}", "give it as --checkpoint") if titles else (seen, "see the README for the files")
        raise CheckpointError(f"--clap {clap.source.name} looks like {seen}, not like a CLAP checkpoint; {hint}")
    fitting = recognising(checkpoint)
    if fitting and family not in (None, *fitting):
        seen, named = (family_class(name).facts.title for name in (fitting[0], str(family)))
        raise CheckpointError(f"--checkpoint {checkpoint.source.name} is a checkpoint of {seen}, and not of {named}; leave --family out")
    fitting = fitting if family is None else [family]
    if not fitting:
        hint = "give it as --clap" if (seen := describe_tensors(checkpoint.tensors)) == "a CLAP checkpoint" else "name its --family"
        known = ", ".join(family_class(name).facts.title for name in family_names())
        raise CheckpointError(f"--checkpoint {checkpoint.source.name} looks like {seen}, and not like any of {known}; {hint}")
    return _module(fitting[0]).open_model(clap, checkpoint)


def recognising(checkpoint: Checkpoint) -> list[str]:
    """Names of the families that know a checkpoint for theirs."""
    return [name for name in family_names() if _module(name).recognises(checkpoint)]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{families.__name__}.{name}")


def describe_tensors(names: Iterable[str]) -> str:
    """What a file of tensors that are no separation model is, in words."""
    names = [name.removeprefix("module.") for name in names]

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if has("text_branch.") and has("audio_branch."):
        return "a CLAP checkpoint with feature fusion" if has("audio_branch.patch_embed.fusion") else "a CLAP checkpoint"
    if has("roberta.") or has("encoder.layer.") or has("embeddings."):
        return "a RoBERTa checkpoint"
    kinds = Counter(".".join(name.split(".")[:2]) for name in names)
    shown = ", ".join(f"{prefix} ({count})" for prefix, count in kinds.most_common(SHOWN))
    return f"{len(names)} tensors under {shown}{', …' if len(kinds) > SHOWN else ''}"
