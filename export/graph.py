"""Trace a module into one ONNX file: symbolic batch, everything else fixed, nothing dynamic inside."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir
import torch

from ..engines.engine import TensorSpec
from ..runtime.bundle import describe_file
from ..runtime.errors import ExportError
from ..runtime.manifest import FileEntry, GraphEntry
from .specs import GraphSpec

OPSET = 20  # Gelu and LayerNormalization are single operators; TensorRT 10, 11 and RTX parse all that we use of it
FORBIDDEN = ("Shape", "If", "Loop", "Scan", "SequenceAt", "SplitToSequence", "NonZero")
DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}


def export_graph(spec: GraphSpec, root: Path, metadata: Mapping[str, Any]) -> GraphEntry:
    """Write `root/graphs/NAME.onnx` and its weights `NAME.onnx.data`; returns the manifest's entry.

    Raises:
        ExportError: the exporter failed, or the graph has nodes that an engine cannot compile.
    """
    path = root / "graphs" / f"{spec.name}.onnx"
    path.parent.mkdir(exist_ok=True)
    model = trace(spec)
    model.metadata_props.update({key: json.dumps(value, sort_keys=True) for key, value in metadata.items()})
    ir.save(model, path, external_data=f"{path.name}.data")
    return inspect_graph(root, spec.name, metadata["precision"])


def trace(spec: GraphSpec) -> ir.Model:
    """A module as an ONNX graph in memory, with a symbolic batch.

    Raises:
        ExportError: the exporter failed.
    """
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                spec.module,
                tuple(spec.inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(spec.inputs),
                dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in spec.inputs),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(
            f"{spec.name} cannot be exported ({str(error).splitlines()[0]}); report it with the versions of torch and onnx"
        ) from error
    assert program is not None
    _strip(program.model)
    _name_outputs(program.model, spec.outputs, spec.inner)
    return program.model


def _strip(model: ir.Model) -> None:
    """Drop the exporter's notes (source paths, stack traces), which name the build machine and make files differ."""
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "clapsep-export", None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _name_outputs(model: ir.Model, names: tuple[str, ...], inner: tuple[str, ...]) -> None:
    """The exporter's own renaming may collide with a value inside (an nn.Embedding makes an "embedding")."""
    wanted = (*names, *inner)
    for node in model.graph:
        for value in node.outputs:
            if value.name in wanted:
                value.name = f"{value.name}_inner"
    for value, name in zip(model.graph.outputs, wanted, strict=True):
        value.name = name
    for _ in inner:
        model.graph.outputs.pop()


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter prints progress and warns about packages that are not needed; failures still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def inspect_graph(
    root: Path, name: str, precision: str, fp32_nodes: tuple[str, ...] = (), known: Mapping[str, FileEntry] = MappingProxyType({})
) -> GraphEntry:
    """Check a written graph and describe it; `known` files need not be hashed again.

    Raises:
        ExportError: a forbidden node, or an interface that is not [batch, fixed …].
    """
    relative = f"graphs/{name}.onnx"
    path = root / relative
    onnx.checker.check_model(str(path), full_check=True)  # types too
    model = onnx.load(str(path), load_external_data=False)
    found = Counter(node.op_type for node in model.graph.node)
    bad = sorted(set(found) & set(FORBIDDEN))
    if bad:
        raise ExportError(f"{relative} has nodes that engines cannot compile ahead of time ({', '.join(bad)}); report it")
    data = _weights_file(model, relative)
    return GraphEntry(
        graph=describe_file(root, relative),
        data=None if data is None else known.get(data) or describe_file(root, data),
        inputs=tuple(_tensor_spec(value, relative) for value in model.graph.input),
        outputs=tuple(_tensor_spec(value, relative) for value in model.graph.output),
        precision=precision,
        opset=next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        nodes=len(model.graph.node),
        fp32_nodes=fp32_nodes,
    )


def _weights_file(model: onnx.ModelProto, where: str) -> str | None:
    """The one file that holds a graph's large weights, relative to the bundle."""
    external = (entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location")
    files = {entry.value for entry in external}
    if len(files) > 1:
        raise ExportError(f"{where} has weights in {len(files)} files, not in one; report it")
    return f"graphs/{files.pop()}" if files else None


def _tensor_spec(value: onnx.ValueInfoProto, where: str) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    if shape[0] != "batch" or not all(isinstance(size, int) and size > 0 for size in shape[1:]) or tensor.elem_type not in DTYPES:
        raise ExportError(f"{where}: {value.name} is {shape}, not [batch, fixed sizes]; report it")
    return TensorSpec(value.name, DTYPES[tensor.elem_type], shape)  # pyright: ignore[reportArgumentType]
