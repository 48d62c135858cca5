"""Read checkpoints, which are untrusted files: tensors, numpy values and plain containers, nothing that executes."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.bundle import sha256_of
from ..runtime.errors import CheckpointError
from ..runtime.manifest import Source

Tensors = dict[str, Tensor]
WEIGHTS = ("checkpoint", "demo", "generated")

# How torch words a refusal: with or without the kind of thing, with or without a module.
REFUSED = re.compile(r"Unsupported (?:global|class).*?([A-Za-z_][\w.]*) was not|(?:GLOBAL|class|function) [`'\"]?([A-Za-z_][\w.]*\.\w+)")

# Recomputed from the sizes, never read: DSP kernels, index tables, masks, counters.
DERIVED = re.compile(
    r"(^|\.)i?stft\.|logmel_extractor\.melW$|relative_position_index$|attn_mask$|position_ids$|num_batches_tracked$|^resampler\."
)

# What a pickle may refer to besides tensors and plain containers, under the names that numpy 1 and 2 give it.
MAKERS: list[tuple[str, Any]] = [("scalar", np.float64(0)), ("_reconstruct", np.zeros(1))]
NUMPY = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"),
    *((made.__reduce__()[0], f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name, made in MAKERS),
]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file by name, prefixes as stored, and what its safetensors header says about itself."""

    source: Source
    tensors: Tensors
    metadata: dict[str, Any]


def read_checkpoint(path: str | Path, role: str) -> Checkpoint:
    """Read a torch.save file or a safetensors file.

    `role` is the flag that named it, for messages and the manifest. Of a torch file, the `state_dict` inside, the flat dict of
    tensors itself, or the only dict of tensors inside.

    Raises:
        CheckpointError: missing, unreadable, or with content other than tensors, numpy values and plain containers.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path's, it says no to names that no file can have
        raise CheckpointError(f"--{role} {path} is not a file; check the path")
    if path.stat().st_size == 0:
        raise CheckpointError(f"--{role} {path} is empty; download it again")
    tensors, metadata = _read_safetensors(path, role) if _is_safetensors(path) else (_read_torch(path, role), {})
    return Checkpoint(Source(role, path.name, sha256_of(path), path.stat().st_size), tensors, metadata)


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (
        len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    )


def _read_safetensors(path: Path, role: str) -> tuple[Tensors, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            stored = (file.metadata() or {}).get("clapsep", "{}")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"--{role} {path} is not a whole safetensors file ({error}); download it again") from error
    try:
        metadata = json.loads(stored)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"--{role} {path} has metadata 'clapsep' that is not JSON ({error}); write it again") from error
    if not isinstance(metadata, dict):
        raise CheckpointError(f"--{role} {path} has metadata 'clapsep' that is not a JSON object; write it again")
    return tensors, metadata


def _read_torch(path: Path, role: str) -> Tensors:
    archive = _check_archive(path, role)
    try:
        with torch.serialization.safe_globals(NUMPY), _Bounded(path) as file:
            content = torch.load(path if archive else file, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # a hostile pickle can raise anything from inside the unpickler
        raise CheckpointError(f"--{role} {path} {_why(str(error))}") from error
    if isinstance(content, dict):
        inside = [value for value in content.values() if _holds_tensors(value)]
        if isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        elif len(inside) == 1 and not _holds_tensors(content):
            content = inside[0]
    if not _holds_tensors(content):
        raise CheckpointError(f"--{role} {path} holds no state dict of tensors; give a checkpoint or a safetensors file")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"--{role} {path} has a tensor {name} {list(value.shape)} of more values than it holds; do not use it")
    return tensors


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(value, Tensor) for value in content.values())


class _Bounded(io.BufferedReader):
    """A file that is never asked for more than it has: Python would allocate what a pickle asks for before it reads."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, max(self._size - self.tell(), 0)))


def _check_archive(path: Path, role: str) -> bool:
    """Whether the file is a zip; torch.save stores its members as they are, anything else could unpack to any size."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        members = zipfile.ZipFile(path).infolist()
    except Exception as error:  # a damaged directory raises more than BadZipFile
        raise CheckpointError(f"--{role} {path} is a damaged archive ({error}); download it again") from error
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > path.stat().st_size:
        raise CheckpointError(f"--{role} {path} is a compressed archive, which torch.save never writes; it is not read")
    return True


def _why(message: str) -> str:
    """One sentence out of torch's explanation of a refused or damaged pickle."""
    refused = REFUSED.search(message)
    if refused:
        name = refused.group(1) or refused.group(2)
        return f"refers to {name}, which is not loaded because it could run code; save the bare tensors as safetensors"
    reason = next(iter(message.strip().splitlines()), "it ends too early")
    return f"is damaged or not a checkpoint ({reason[:200]}); download it again"


class Problems:
    """Everything that is wrong with a checkpoint, collected to be told at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def take(self, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> Tensors:
        """The expected tensors as float32; those that are missing, mis-shaped, or not finite are noted and left out."""
        taken: Tensors = {}
        for name, like in expected.items():
            value = tensors.get(name)
            if value is None:
                self.lines.append(f"{where}{name} is missing")
            elif value.shape != like.shape:
                self.lines.append(f"{where}{name} has shape {list(value.shape)} instead of {list(like.shape)}")
            elif not value.is_floating_point():
                self.lines.append(f"{where}{name} is {value.dtype} instead of floating point")
            elif not bool(torch.isfinite(single := value.to(torch.float32)).all()):
                self.lines.append(f"{where}{name} has NaN or infinite values")
            elif name.endswith("running_var") and not bool((single > 0).all()):
                self.lines.append(f"{where}{name} has variances that are not positive")
            else:
                taken[name] = single
        return taken

    def surplus(self, names: list[str]) -> None:
        self.lines += [f"{name} is not part of the model" for name in names]

    def raise_if_any(self, what: str) -> None:
        if self.lines:
            shown = "".join(f"\n  {line}" for line in self.lines[:20])
            more = f"\n  … and {len(self.lines) - 20} more" if len(self.lines) > 20 else ""
            raise CheckpointError(f"{what} does not fit the model in {len(self.lines)} tensors; give the published files:{shown}{more}")


def shape_of(tensors: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    """Shape of a tensor that tells sizes of the model; raises CheckpointError if it is missing or of another rank."""
    value = tensors.get(name)
    if value is None or value.ndim != rank or 0 in value.shape:
        seen = "is missing" if value is None else f"has shape {list(value.shape)}"
        raise CheckpointError(f"the checkpoint does not fit the model: {name} {seen}; give the published files")
    return tuple(value.shape)


def count_of(tensors: Iterable[str], prefix: str) -> int:
    """Length of the module list `prefix`, by the highest index that appears."""
    indices = [int(m.group(1)) for name in tensors if (m := re.match(re.escape(prefix) + r"\.(\d{1,3})\.", name))]
    return max(indices, default=-1) + 1


@dataclass(frozen=True)
class About:
    """Where weights come from, and the words that a small model was trained on (None: a full vocabulary)."""

    weights: str = "checkpoint"
    words: list[str] | None = None


def about(*metadata: Mapping[str, Any]) -> About:
    """What the files' metadata say of the weights; the last file that speaks counts."""
    described = About()
    for m in metadata:
        described = About(m.get("weights", described.weights), m.get("words", described.words))
        words = described.words
        if described.weights not in WEIGHTS or not (words is None or (isinstance(words, list) and all(isinstance(w, str) for w in words))):
            kinds = ", ".join(WEIGHTS)
            raise CheckpointError(f"the checkpoint's metadata must have weights of {kinds} and a list of words; write it again")
    return described
