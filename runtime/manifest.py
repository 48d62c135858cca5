"""manifest.json as frozen dataclasses, read strictly and written canonically. `docs/bundle.md` is the normative text."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from ..engines.engine import TensorSpec
from ..engines.plan import Target
from .errors import ManifestError, SchemaVersionError

T = TypeVar("T")
FORMAT = "clapsep-bundle"
SCHEMA_VERSION = 1
DTYPES = ("float32", "int64")  # of inputs and outputs


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: POSIX path relative to the bundle, size in bytes, lower-case hex SHA-256."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class GraphEntry:
    """One ONNX graph; `data` holds its weights, `fp32_nodes` the nodes kept in float32 at lower precisions."""

    graph: FileEntry
    data: FileEntry | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    opset: int
    nodes: int
    fp32_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A file that the bundle was made from."""

    role: str
    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Gate:
    """One check with its limit: `measured` must be at least (`>=`) or at most (`<=`) `threshold`; None is NaN or infinite."""

    engine: str
    stage: str
    metric: str
    relation: str
    threshold: float
    measured: float | None
    passed: bool


@dataclass(frozen=True)
class Plan:
    """One graph compiled: by which engine kind, in which precision, and what the plan runs on.

    `key` is a hash of everything that went into the plan; compiling the same again would give the same.
    """

    graph: str
    kind: str
    precision: str
    target: Target
    key: str
    plan: FileEntry


@dataclass(frozen=True)
class Manifest:
    """Everything needed to decide whether and how to run a bundle."""

    family: str
    variant: dict[str, Any]
    weights: str
    sources: tuple[Source, ...]
    toolchain: dict[str, str]
    dsp: dict[str, Any]
    condition: dict[str, Any]
    query: dict[str, Any]
    max_batch: int
    graphs: dict[str, GraphEntry]
    tokenizer: FileEntry | None
    golden: FileEntry
    gates: tuple[Gate, ...]
    plans: tuple[Plan, ...] = ()
    format: str = FORMAT
    schema_version: int = SCHEMA_VERSION

    def files(self, *, plans: bool = True) -> list[FileEntry]:
        """Every file that the manifest vouches for, with or without the plans."""
        graphs = [entry for g in self.graphs.values() for entry in (g.graph, g.data) if entry is not None]
        rest = [entry for entry in (self.tokenizer, self.golden) if entry is not None]
        return list(dict.fromkeys(graphs + rest + ([plan.plan for plan in self.plans] if plans else [])))  # graphs may share their weights

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Read a manifest; `where` names it in errors. Unknown fields are ignored.

    Raises:
        ManifestError: not JSON, or a field is missing or mistyped (the message gives its path).
        SchemaVersionError: a schema version that this code does not know.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where} is not valid JSON ({error}); build the bundle again") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ManifestError(f"{where} is not the manifest of a {FORMAT}; give the directory that clapsep-export build wrote")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{where} has schema version {data.get('schema_version')!r} and this version reads {SCHEMA_VERSION}; "
            "install the clapsep-export that wrote it, or build the bundle again"
        )
    manifest = _decode(Manifest, data, where)
    odd = [name for name in manifest.graphs if not re.fullmatch(r"[a-z0-9_]{1,64}", name)]
    if odd:  # names become parts of paths
        raise ManifestError(f"{where} has a graph {odd[0]!r}, whose name is not of small letters, digits and _; build the bundle again")
    for name, graph in manifest.graphs.items():
        for tensor in (*graph.inputs, *graph.outputs):
            _check_tensor(tensor, f"{where}: graph '{name}'")
    if manifest.max_batch < 1:
        raise ManifestError(f"{where} has max_batch {manifest.max_batch}, which is no batch; build the bundle again")
    return manifest


def _check_tensor(tensor: TensorSpec, where: str) -> None:
    batch, *axes = tensor.shape or ("",)
    if tensor.dtype not in DTYPES or batch != "batch" or not all(isinstance(size, int) and size > 0 for size in axes):
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ManifestError(f"{where} has a tensor {found}, not float32 or int64 [batch, sizes]; build the bundle again")


def _finite(text: str) -> float:
    """Python reads 1e999 as infinity, which JSON cannot say again."""
    if not math.isfinite(value := float(text)):
        _refuse_constant(text)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def decode(kind: type[T], value: Any, where: str) -> T:
    """`value`, as JSON gives it, as an instance of the frozen dataclass `kind`.

    Raises:
        ManifestError: a field is missing or mistyped; the message gives its path.
    """
    return _decode(kind, value, where)


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as an instance of the annotated type `kind`; raises ManifestError with the field's path."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _decode_union(args, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) in (int, float):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    name = "list" if origin is tuple else getattr(origin or kind, "__name__", str(kind))
    raise ManifestError(f"{where} must be a {name}, not {type(value).__name__}; build the bundle again")


def _decode_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    if types.NoneType in options:
        return _decode(next(option for option in options if option is not types.NoneType), value, where)
    if type(value) in options:
        return value
    raise ManifestError(f"{where} must be one of {[o.__name__ for o in options]}, not {type(value).__name__}; build the bundle again")


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ManifestError(f"{where} must be an object, not {type(value).__name__}; build the bundle again")
    hints = typing.get_type_hints(kind)
    fields = {}
    for f in dataclasses.fields(kind):
        if f.name in value:
            fields[f.name] = _decode(hints[f.name], value[f.name], f"{where}: {f.name}" if kind is Manifest else f"{where}.{f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ManifestError(f"{where} lacks the field '{f.name}'; build the bundle again")
    return kind(**fields)
