"""Graphs made out of another, whose weights they share in one file: cut out of it, put between two modules, or traced with other sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..runtime.errors import ExportError
from ..runtime.manifest import GraphEntry
from .graph import inspect_graph, trace
from .precision import convert, float32_inputs, float32_outputs
from .specs import Cut, Derived, Variant, Wrap


def derive(spec: Derived, root: Path, sources: Mapping[str, GraphEntry], metadata: Mapping[str, Any]) -> GraphEntry:
    """Write `root/graphs/NAME.onnx`, whose large weights are those of its source, at the source's precision; returns the manifest's entry.

    Raises:
        ExportError: the exporter failed, or the graph has nodes that an engine cannot compile.
    """
    source = sources[spec.source]
    path = root / source.graph.file
    model = _make(spec, path, source)
    own = {"graph": spec.name, "precision": source.precision}
    model.metadata_props.update({key: json.dumps(value, sort_keys=True) for key, value in {**metadata, **own}.items()})
    ir.save(model, path.with_name(f"{spec.name}.onnx"))
    names = {str(node.name) for node in model.graph}
    kept = tuple(name for name in source.fp32_nodes if name in names)
    known = {} if source.data is None else {source.data.file: source.data}
    return inspect_graph(root, spec.name, source.precision, kept, known)


def _make(spec: Derived, path: Path, source: GraphEntry) -> ir.Model:
    if isinstance(spec, Cut):
        return _cut(path, spec)
    return _wrap(path, spec) if isinstance(spec, Wrap) else _vary(path, spec, source)


def _cut(path: Path, spec: Cut) -> ir.Model:
    model = ir.load(path)
    graph = ir.convenience.extract(model.graph, list(spec.inputs), list(spec.outputs))
    graph.name = spec.name
    constants = sorted(graph.initializers.items())  # they come in another order in every process
    graph.initializers.clear()
    graph.initializers.update(constants)
    float32_inputs(graph)
    float32_outputs(graph)
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)


def _wrap(path: Path, spec: Wrap) -> ir.Model:
    model = ir.load(path)
    parts = (_named(trace(spec.before).graph, "before"), model.graph, _named(trace(spec.after).graph, "after"))
    inputs: list[ir.Value] = []
    made: dict[str, ir.Value] = {}
    for part in parts:
        for value in part.inputs:
            if str(value.name) in made:
                ir.convenience.replace_all_uses_with(value, made[str(value.name)])
            else:
                inputs.append(value)
        made.update({str(value.name): value for value in part.outputs})
    outputs = list(parts[-1].outputs)
    nodes, initializers = [node for part in parts for node in part], [value for part in parts for value in part.initializers.values()]
    for part in parts:
        part.inputs.clear()
        part.outputs.clear()
        part.remove(list(part))
        part.initializers.clear()
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=parts[1].opset_imports, name=spec.name)
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)


def _vary(path: Path, spec: Variant, source: GraphEntry) -> ir.Model:
    model = trace(spec.spec)
    if source.precision == "fp16":
        missing = set(source.fp32_nodes) - {str(node.name) for node in model.graph}
        if missing:
            raise ExportError(f"{spec.name} has not the nodes of {spec.source} that stay in float32, {min(missing)} first; report it")
        convert(model, source.fp32_nodes)
    tensors = (value.const_value for value in ir.load(path).graph.initializers.values())
    stored = {_content(tensor): tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = stored.get(_content(value.const_value), value.const_value)
    return model


def _content(tensor: ir.TensorProtocol) -> tuple[str, str, str]:
    """What tells constants apart; the exporter's names may differ from trace to trace."""
    return str(tensor.dtype), str(tensor.shape), hashlib.sha256(tensor.tobytes()).hexdigest()


def _named(graph: ir.Graph, prefix: str) -> ir.Graph:
    """Prefix what is inside a graph, so that no name appears twice when graphs are joined."""
    outside = {*graph.inputs, *graph.outputs}
    inside = [value for node in graph for value in node.outputs if value not in outside]
    for item in (*inside, *list(graph.initializers.values()), *graph):
        item.name = f"{prefix}_{item.name}"
    return graph
