"""Ways to damage ONNX graphs with their structure in mind. The first byte of an input says which graph it is and stays."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
from clapsep.runtime.graph import OPERATORS as ALLOWED

from .mutators import NUMBERS, TEXTS, damage

OPERATORS = ("If", "Loop", "Scan", "Constant", "ConstantOfShape", "Expand", "Tile", "Range", "Reshape", "Gather", "Split", "Resize", "Conv")
OPERATORS += (
    "Identity",
    "MatMul",
    "Pad",
    "OneHot",
    "NonZero",
    "TopK",
    "EyeLike",
    "Einsum",
    "QuantizeLinear",
    "LSTM",
    "StringSplit",
    "Nope",
)
ORDINARY = sorted(ALLOWED)
PLACES = ("/etc/passwd", "../../../etc/passwd", "/dev/zero", ".", "", "separator.onnx", "../golden.npz", "../manifest.json", "x\0y", "none")
Edit = Any  # (rng, graph) → None


def damage_graph(rng: random.Random, data: bytes) -> bytes:
    return data[:1] + damage(rng, data[1:])


def edit_graph(rng: random.Random, data: bytes) -> bytes:
    """Nodes, tensors, types or external data changed; a valid protobuf message."""
    model = onnx.load_from_string(data[1:])
    for _ in range(rng.choice((1, 1, 2, 4))):
        graph = model.graph
        if graph.node and graph.initializer and graph.input and graph.output:  # earlier edits may have taken the last
            rng.choice(EDITS)(rng, model)
    return data[:1] + model.SerializeToString()


def bury_graph(rng: random.Random, data: bytes) -> bytes:
    """A branch within branches, deeper than Python's protobuf would write: graph (7) { node (1) { attribute (5) { g (6) … } } }."""
    inner = b""
    for _ in range(rng.choice((30, 1000, 5000))):
        for field in (6, 5, 1):
            inner = bytes([field << 3 | 2]) + _length(len(inner)) + inner
    return data + b"\x3a" + _length(len(inner)) + inner


def _length(size: int) -> bytes:
    """A number as protobuf writes it."""
    out = b""
    while size > 127:
        out, size = out + bytes([size & 127 | 128]), size >> 7
    return out + bytes([size])


def _nodes(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = model.graph.node
    node, other = rng.choice(nodes), rng.choice(nodes)
    way = rng.randrange(7)
    if way == 0:
        node.op_type = rng.choice((rng.choice(OPERATORS), rng.choice(ORDINARY), other.op_type))
    elif way == 1 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice((*other.input, *other.output, "", "nowhere"))
    elif way == 2:
        node.output[0] = rng.choice((other.output[0], "", *node.input))
    elif way == 3:
        nodes.remove(node)
    elif way == 4:
        nodes.add().CopyFrom(node)
    elif way == 5:
        del node.input[rng.randrange(len(node.input) + 1) :]
    else:
        node.domain = rng.choice((*TEXTS[:3], "com.microsoft", "ai.onnx.ml"))


def _attributes(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice([n for n in model.graph.node if n.attribute] or list(model.graph.node))
    if not node.attribute:
        node.attribute.append(onnx.helper.make_attribute("axis", rng.choice(NUMBERS)))
    attribute = rng.choice(node.attribute)
    way = rng.randrange(5)
    if way == 0:
        attribute.i = rng.choice((rng.choice(NUMBERS), rng.randrange(-9, 9)))
    elif way == 1:
        attribute.ints.extend(rng.choices((rng.choice(NUMBERS), *range(-3, 9)), k=rng.choice((1, 2))))
    elif way == 2:
        attribute.type = rng.randrange(15)
    elif way == 3:
        node.attribute.remove(attribute)
    else:
        attribute.name = rng.choice((*TEXTS[:2], "axis", "perm", "to", "value"))


def _tensors(rng: random.Random, model: onnx.ModelProto) -> None:
    tensor = rng.choice(model.graph.initializer)
    way = rng.randrange(6)
    numbers = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT64 and t.raw_data and len(t.raw_data) % 8 == 0]
    if numbers and rng.random() < 0.4:  # axes, shapes, indices
        tensor = rng.choice(numbers)
        values = np.frombuffer(tensor.raw_data, "<i8").copy()
        values[rng.randrange(len(values))] = rng.choice((rng.choice(NUMBERS), rng.randrange(-9, 9)))
        tensor.raw_data = values.astype("<i8").tobytes()
    elif way == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
    elif way == 1:
        tensor.data_type = rng.randrange(25)
    elif way == 2:
        tensor.raw_data = rng.randbytes(rng.choice((0, 1, 4, 8, 1000)))
    elif way == 3:
        tensor.dims.append(rng.choice(NUMBERS))
    elif way == 4:
        model.graph.initializer.remove(tensor)
    else:
        size = min(1000, int(np.prod(tensor.dims[:1]))) if len(tensor.dims) < 2 else 1
        values = np.array(rng.choices((*NUMBERS, *range(-9, 9)), k=max(1, size)), np.int64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _external(rng: random.Random, model: onnx.ModelProto) -> None:
    outside = [t for t in model.graph.initializer if t.external_data] or list(model.graph.initializer)
    tensor = rng.choice(outside)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {entry.key: entry.value for entry in tensor.external_data} or {"location": "separator.onnx.data"}
    key = rng.choice(("location", "location", "offset", "length", "checksum", "offset"))
    entries[key] = rng.choice(PLACES) if key == "location" else str(rng.choice((*NUMBERS, "", "x", "1e3", "-1", "0x10", "9" * 30)))
    if rng.random() < 0.1:
        del entries[rng.choice(list(entries))]
    del tensor.external_data[:]
    for name, value in entries.items():
        tensor.external_data.add(key=name, value=value)


def _values(rng: random.Random, model: onnx.ModelProto) -> None:
    """Declared inputs and outputs: names, types, axes; one more, one fewer."""
    side = rng.choice((model.graph.input, model.graph.output, model.graph.output))
    value = rng.choice(side)
    axes = value.type.tensor_type.shape.dim
    way = rng.randrange(7)
    if way == 0:
        value.name = rng.choice((value.name + "x", *TEXTS[:2], *model.graph.node[0].output))
    elif way == 1 and axes:
        rng.choice(axes).dim_value = rng.choice(NUMBERS)
    elif way == 2 and axes:
        rng.choice(axes).dim_param = rng.choice(("batch", "n", ""))
    elif way == 3:
        value.type.tensor_type.elem_type = rng.randrange(25)
    elif way == 4:
        side.remove(value)
    elif way == 5:
        side.append(onnx.helper.make_tensor_value_info("extra", 1, ["batch", rng.choice(NUMBERS)]))
    elif axes:
        axes.pop()


def _frame(rng: random.Random, model: onnx.ModelProto) -> None:
    """The model around the graph: versions, domains, functions, depth, a node that makes something huge, a loop without end."""
    way = rng.randrange(6)
    if way == 0:
        model.ir_version = rng.choice(NUMBERS)
    elif way == 1:
        model.opset_import[0].version = rng.choice((*NUMBERS, 5, 9, 30))
    elif way == 2:
        model.functions.append(onnx.helper.make_function("", rng.choice(("f", "MatMul")), ["a"], ["b"], [], []))
    elif way == 3:
        _replace_output(model, _huge(rng))
    elif way == 4:
        _replace_output(model, [_nested(rng.choice((2, 10, 20)))])
    else:
        _replace_output(model, _endless())


def _replace_output(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """The last node's place is taken by nodes that give `made`."""
    last = model.graph.node[-1]
    name = last.output[0]
    last.output[0] = "unused"
    model.graph.node.extend(nodes)
    model.graph.node.append(onnx.helper.make_node("Identity", ["made"], [name]))


def _huge(rng: random.Random) -> list[onnx.NodeProto]:
    shape = onnx.numpy_helper.from_array(np.array([rng.choice((1 << 20, 1 << 32, 1 << 62)), rng.choice((1 << 12, 1 << 20))], np.int64))
    return [
        onnx.helper.make_node("Constant", [], ["shape_of_made"], value=shape),
        onnx.helper.make_node("ConstantOfShape", ["shape_of_made"], ["made"]),
    ]


def _nested(depth: int) -> onnx.NodeProto:
    """Branches within branches."""
    false = onnx.helper.make_tensor("c", onnx.TensorProto.BOOL, [], [False])
    node = onnx.helper.make_node("Constant", [], ["made"], value_float=1.0)
    for level in range(depth):
        output = onnx.helper.make_tensor_value_info("made", 1, None)
        branch = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], [f"c{level}"], value=false), node], "g", [], [output])
        outer = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["made"], value_float=1.0)], "g", [], [output])
        node = onnx.helper.make_node("If", ["no_condition"], ["made"], then_branch=branch, else_branch=outer)
    return node


def _endless() -> list[onnx.NodeProto]:
    true = onnx.helper.make_tensor("t", onnx.TensorProto.BOOL, [], [True])
    value = onnx.helper.make_tensor("v", onnx.TensorProto.FLOAT, [], [1.0])
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["go"], ["go_on"]), onnx.helper.make_node("Add", ["x", "x"], ["y"])],
        "body",
        [onnx.helper.make_tensor_value_info(n, t, []) for n, t in (("i", 7), ("go", 9), ("x", 1))],
        [onnx.helper.make_tensor_value_info(n, t, []) for n, t in (("go_on", 9), ("y", 1))],
    )
    return [
        onnx.helper.make_node("Constant", [], ["go_first"], value=true),
        onnx.helper.make_node("Constant", [], ["x_first"], value=value),
        onnx.helper.make_node("Loop", ["", "go_first", "x_first"], ["made"], body=body),
    ]


EDITS: tuple[Edit, ...] = (_nodes, _nodes, _attributes, _tensors, _external, _external, _values, _values, _frame)
