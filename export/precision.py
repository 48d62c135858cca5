"""From a float32 graph to a typed mixed-precision one: float16 where it is safe, float32 where it is not, chosen by measurement.

TensorRT 11 knows only strongly typed networks, so precision is a property of the graph and every engine kind runs the same one.
Inputs and outputs stay as they are.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from ..runtime.metrics import snr
from .strict import StrictGraph

Feeds = Mapping[str, NDArray[Any]]
HALF = ir.DataType.FLOAT16
MAXIMUM = 65504.0  # of float16
HEADROOM = 8.0  # how far below that every activation of the calibration signals must stay
TINY = 6.1e-5  # smallest normal float16: constants below lose accuracy
REQUIRED = 46.0  # dB that every output must keep against float32, or the nodes that spoil it are searched for

# Sums of squares, quotients and exponentials: what overflows first and what the outputs depend on most. Means stay within their inputs.
NORMALISATIONS = frozenset({"Pow", "ReduceSum", "ReduceL2", "Sqrt", "Reciprocal", "Div", "Clip", "Exp", "Log"})
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})
MOVES = frozenset({"Reshape", "Transpose", "Split", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Pad", "Identity", "Expand"})


@dataclass(frozen=True)
class Policy:
    """Operator types that stay in float32 wherever they are; `edges` keeps what lies before the first and after the last product."""

    float32: frozenset[str] = NORMALISATIONS
    edges: bool = True


def is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def computes(node: ir.Node) -> bool:
    """Whether float values go through a node."""
    return any(is_float(value) for value in (*node.inputs, *node.outputs))


def keep(graph: ir.Graph, ranges: Mapping[str, float], policy: Policy, found: Collection[str] = ()) -> dict[str, str]:
    """Nodes that stay in float32, by name, each with the reason. `ranges`: largest magnitude of each value on the calibration signals."""
    kept: dict[str, str] = {}
    for node in filter(computes, graph):
        name = str(node.name)
        if name in found:
            kept[name] = "accuracy"
        elif node.op_type in policy.float32:
            kept[name] = "operator"
        elif _largest(node, ranges) * HEADROOM > MAXIMUM:
            kept[name] = "range"
        elif not all(map(_representable, node.inputs)):
            kept[name] = "constant"
        elif policy.edges and _at_the_edge(node, kept):
            kept[name] = "edge"
    return _follow(graph, kept)


def _largest(node: ir.Node, ranges: Mapping[str, float]) -> float:
    """Of what a node takes and makes; for a LayerNormalization also of the sums inside, which some engines take in the type outside."""
    values = [ranges.get(str(value.name), 0.0) for value in (*node.inputs, *node.outputs) if value is not None]
    return max([*values, ranges.get(_squares(node.inputs[0]), 0.0) if node.op_type == "LayerNormalization" else 0.0])


def _squares(value: ir.Value | None) -> str:
    """Where `measure_ranges` puts the largest sum of squares of a row of a LayerNormalization's input."""
    return f"{value.name if value is not None else ''}, squares"


def _representable(value: ir.Value | None) -> bool:
    """Whether a constant survives float16: nothing overflows, and a single number keeps its value."""
    if value is None or value.const_value is None or not is_float(value):
        return True
    array = np.abs(value.const_value.numpy())
    return not array.size or bool(array.max() <= MAXIMUM and (array.size > 1 or array.max() == 0 or array.max() >= TINY))


def _at_the_edge(node: ir.Node, kept: Mapping[str, str]) -> bool:
    """Elementwise work straight on a graph's float input (decibels, magnitudes) or straight before its output."""
    if node.op_type in PRODUCTS:
        return False
    if any(value.is_graph_output() for value in node.outputs):
        return True
    data = [value for value in node.inputs if is_float(value) and value is not None and value.const_value is None]
    return bool(data) and all(v.is_graph_input() or (v.producer() is not None and kept.get(str(v.producer().name)) == "edge") for v in data)  # pyright: ignore[reportOptionalMemberAccess]


def _follow(graph: ir.Graph, kept: dict[str, str]) -> dict[str, str]:
    """Nodes that only move values take the type around them, so that casts stand where the type really changes."""
    moves = {str(node.name): node for node in graph if node.op_type in MOVES and computes(node) and str(node.name) not in kept}
    tentative = {**kept, **dict.fromkeys(moves, "between")}
    while True:  # whatever touches float16 on either side is taken back, until nothing changes
        wrong = [name for name, node in moves.items() if name in tentative and not _between(node, tentative)]
        if not wrong:
            return tentative
        for name in wrong:
            del tentative[name]


def _between(node: ir.Node, kept: Mapping[str, str]) -> bool:
    """Whether all float values that a node takes come from float32 nodes, and all its users are such."""
    data = [value for value in node.inputs if value is not None and is_float(value) and value.const_value is None]
    sources = [value.producer() for value in data]
    users = [use for value in node.outputs for use, _ in value.uses()]
    taken = all(source is None or str(source.name) in kept for source in sources)
    return bool(users) and taken and any(sources) and all(str(use.name) in kept for use in users)


class _Caster:
    """Puts casts into a graph, at most one of each kind for a value."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[str, ir.DataType], ir.Value] = {}

    def cast(self, value: ir.Value, wanted: ir.DataType, user: ir.Node) -> ir.Value:
        key = (str(value.name), wanted)
        if key not in self._made:
            constant = value.const_value is not None
            self._made[key] = self._constant(value, wanted) if constant else self._node(value, wanted, value.producer(), user)
        return self._made[key]

    def _constant(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy().astype(wanted.numpy())
        made = ir.Value(
            name=f"{value.name}_{wanted.name.lower()}", const_value=ir.tensor(array), shape=value.shape, type=ir.TensorType(wanted)
        )
        self._graph.initializers[str(made.name)] = made
        return made

    def _node(self, value: ir.Value, wanted: ir.DataType, after: ir.Node | None, user: ir.Node) -> ir.Value:
        name = f"{value.name}_{wanted.name.lower()}"
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(wanted))
        node = ir.node("Cast", [value], {"to": int(wanted)}, outputs=[output], name=f"cast_{name}")
        if after is None:
            self._graph.insert_before(self._first(value, user), node)
        else:
            self._graph.insert_after(after, node)
        return output

    def _first(self, value: ir.Value, user: ir.Node) -> ir.Node:
        """The first node in graph order that uses a graph input."""
        users = {use for use, _ in value.uses()}
        return next((node for node in self._graph if node in users), user)


def convert(model: ir.Model, kept: Collection[str]) -> int:
    """Type every float node that is not in `kept` as float16, in place; returns the number of casts."""
    graph = model.graph
    caster = _Caster(graph)
    for node in [node for node in graph if computes(node)]:
        single = str(node.name) in kept
        wanted, other = (ir.DataType.FLOAT, HALF) if single else (HALF, ir.DataType.FLOAT)
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype == other:
                node.replace_input_with(i, caster.cast(value, wanted, node))
        if not single:
            _retype(node)
    float32_outputs(graph)
    unused = [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]
    for name in unused:
        del graph.initializers[name]
    return sum(node.op_type == "Cast" for node in graph)


def _retype(node: ir.Node) -> None:
    for value in node.outputs:
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = HALF
    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(HALF))


def float32_outputs(graph: ir.Graph) -> None:
    """A graph's outputs keep their names and float32."""
    for i, value in enumerate(graph.outputs):
        if value.dtype != HALF:
            continue
        name, value.name = value.name, f"{value.name}_float16"
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
        producer = value.producer()
        assert producer is not None
        graph.insert_after(producer, ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, outputs=[output], name=f"cast_{name}"))
        graph.outputs[i] = output


def float32_inputs(graph: ir.Graph) -> None:
    """A graph's inputs keep their names and are float32."""
    for value in graph.inputs:
        if value.dtype != HALF:
            continue
        half = ir.Value(name=f"{value.name}_float16", shape=value.shape, type=ir.TensorType(HALF))
        ir.convenience.replace_all_uses_with(value, half)
        value.dtype = ir.DataType.FLOAT
        cast = ir.node("Cast", [value], {"to": int(HALF)}, outputs=[half], name=f"cast_{value.name}")
        graph.insert_before(graph[0], cast)


@dataclass(frozen=True)
class Lowered:
    """What became of a graph: float32 nodes with reasons, casts, and what the strict interpreter measured on the calibration signals.

    snr_db: of the worst output on the ordinary signals, against float32. largest: activation typed float16, as a share of 65504.
    not_finite: values typed float16.
    """

    kept: dict[str, str]
    casts: int
    nodes: int
    snr_db: float
    largest: float
    not_finite: int

    def summary(self) -> str:
        reasons = Counter(self.kept.values())
        why = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        return f"{len(self.kept)} of {self.nodes} nodes in float32 ({why}), {self.casts} casts, {self.snr_db:.1f} dB"


def measure_ranges(model: ir.Model, signals: Sequence[Feeds], only: ir.DataType | None = None) -> tuple[dict[str, float], int]:
    """Largest finite magnitude of each float value (of type `only`) over the signals, and how many values were not finite."""
    ranges: dict[str, float] = {}
    broken = 0

    def observe(node: ir.Node, results: list[Tensor]) -> None:
        nonlocal broken
        for value, result in zip(node.outputs, results, strict=False):
            if not result.is_floating_point() or only not in (None, value.dtype):
                continue
            largest = float(result.abs().max())
            if not np.isfinite(largest):
                broken += int((~result.isfinite()).sum())
                largest = MAXIMUM
            ranges[str(value.name)] = max(ranges.get(str(value.name), 0.0), largest)
            if only is None and any(use.op_type == "LayerNormalization" and i == 0 for use, i in value.uses()):
                squares = float(result.float().square().sum(-1).max())
                ranges[_squares(value)] = max(ranges.get(_squares(value), 0.0), squares)

    graph = StrictGraph(model)
    for feeds in signals:
        graph.run(feeds, observe)
        for name, value in feeds.items():
            if only in (None, ir.DataType.FLOAT) and value.dtype == np.float32:
                ranges[name] = max(ranges.get(name, 0.0), float(np.abs(value).max()))
    return ranges, broken


def lower(
    path: Path, ordinary: Sequence[Feeds], hard: Sequence[Feeds] = (), required: float = REQUIRED, policy: Policy = Policy()
) -> Lowered:
    """Replace the float32 graph at `path` (and its weights beside it) by a mixed float16 one.

    `ordinary` and `hard` are inputs of the graph; ranges are measured on all of them, accuracy (`required` dB) on the ordinary ones.
    """
    everything = [*ordinary, *hard]
    ranges, _ = measure_ranges(ir.load(path), everything)
    wanted = _outputs(ir.load(path), ordinary)

    def noise(half: Collection[str]) -> float:
        """Relative error power of the worst output when only the nodes `half` are float16."""
        model = ir.load(path)
        convert(model, [str(node.name) for node in model.graph if str(node.name) not in half])
        return 10 ** (-_worst_snr(wanted, _outputs(model, ordinary)) / 10)

    model = ir.load(path)
    nodes = [str(node.name) for node in model.graph if computes(node)]
    kept = keep(model.graph, ranges, policy)
    found = find_sensitive([name for name in nodes if name not in kept], noise, 10 ** (-required / 10))
    if found:
        kept = keep(model.graph, ranges, policy, found)
    casts = convert(model, kept)
    _save(model, path)
    model = ir.load(path)  # what was written is what is measured
    quality = _worst_snr(wanted, _outputs(model, ordinary))
    halves, broken = measure_ranges(model, everything, HALF)
    return Lowered(kept, casts, len(nodes), quality, max(halves.values(), default=0.0) / MAXIMUM, broken)


def _outputs(model: ir.Model, signals: Sequence[Feeds]) -> list[Feeds]:
    graph = StrictGraph(model)
    return [graph.run(feeds) for feeds in signals]


def _worst_snr(wanted: Sequence[Feeds], found: Sequence[Feeds]) -> float:
    """A value that is not a number counts as the worst."""
    found_all = [snr(value, other[name]) for one, other in zip(wanted, found, strict=True) for name, value in one.items()]
    return min(found_all) if np.isfinite(found_all).all() else -np.inf


def find_sensitive(nodes: list[str], noise: Callable[[Collection[str]], float], budget: float) -> list[str]:
    """The nodes that spoil an output, by bisection: a run of nodes whose noise is within its share of the budget is cleared.

    Where only the whole run spoils it and neither half does alone, the whole run is given.
    """
    if not nodes or noise(nodes) <= budget:
        return []
    if len(nodes) == 1:
        return nodes
    middle = len(nodes) // 2
    return find_sensitive(nodes[:middle], noise, budget / 2) + find_sensitive(nodes[middle:], noise, budget / 2) or nodes


def _save(model: ir.Model, path: Path) -> None:
    """Beside the old files first: their weights are still mapped into `model`."""
    model.metadata_props["precision"] = json.dumps("fp16")
    data = path.with_name(f"{path.name}.data")
    folder = path.parent / "lowered"
    folder.mkdir()
    ir.save(model, folder / path.name, external_data=data.name)
    for file in (data, path):
        os.replace(folder / file.name, file)
    folder.rmdir()
