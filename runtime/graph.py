"""What an ONNX graph in a bundle may be: checked before an engine's own parser, which is native code, sees the file.

Read from protobuf's wire format, as the runtime does not need the onnx package. A manifest's hashes say that a file is the one that was
written, not that its author meant well.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..engines import Engine
from ..engines.engine import TensorSpec
from .errors import BundleError
from .manifest import GraphEntry

# Fields of onnx.proto, by number.
MODEL_VERSION, MODEL_OPSETS, MODEL_GRAPH, MODEL_PLAIN = 1, 8, 7, {1, 2, 3, 4, 5, 6, 7, 8, 14}  # neither functions nor training
GRAPH_NODES, GRAPH_TENSORS, GRAPH_INPUTS, GRAPH_OUTPUTS, GRAPH_SPARSE = 1, 5, 11, 12, 15
NODE_INPUTS, NODE_OUTPUTS, NODE_OPERATOR, NODE_ATTRIBUTES, NODE_DOMAIN = 1, 2, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INTEGER, ATTRIBUTE_INTEGERS = 1, 3, 8
ATTRIBUTE_PLAIN = {1, 2, 3, 4, 7, 8, 9, 13, 20, 21}  # numbers, strings and names; neither tensors nor graphs
TENSOR_DIMS, TENSOR_TYPE, TENSOR_RAW, TENSOR_OUTSIDE, TENSOR_TYPED = 1, 2, 9, 13, {4, 5, 6, 7, 10, 11}
AXES, SIZES = 8, 1 << 20
ITEM_SIZES = {1: 4, 7: 8, 10: 2}  # float32, int64, float16
# Ordinary arithmetic on tensors; nothing with a body, of random or unbounded size, or that an engine rarely sees.
ORDINARY = """
    Abs Add And AveragePool BatchNormalization Cast Clip Concat Conv ConvTranspose Cos CumSum Div Equal Erf Exp Flatten Gather Gelu Gemm
    GlobalAveragePool Greater GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu Less Log
    MatMul Max MaxPool Min Mul Neg Not Or PRelu Pad Pow Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Sigmoid Sign Sin
    Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Transpose Unsqueeze Where
"""
OPERATORS = frozenset(ORDINARY.split())
TYPE_NAMES = {1: "float32", 7: "int64"}
Fields = dict[int, list[int | memoryview]]


def check_graph(path: Path, entry: GraphEntry) -> None:
    """Whether a graph file is plain: standard operators, no graphs within the graph, tensors whose sizes agree with their bytes.

    Raises:
        BundleError: it is not, or it is no ONNX file.
    """
    try:
        _check_model(_fields(memoryview(path.read_bytes())), entry)
    except (ValueError, LookupError) as error:
        raise BundleError(f"{path} is not a graph that a bundle may have ({error}); do not use this bundle") from error


def check_interface(engine: Engine, entry: GraphEntry) -> None:
    """Whether an engine found the inputs and outputs that the manifest says.

    Raises:
        BundleError: it did not.
    """
    for side, found, listed in (("inputs", engine.inputs, entry.inputs), ("outputs", engine.outputs, entry.outputs)):
        if _names(found) != _names(listed):
            raise BundleError(f"{entry.graph.file} has the {side} {found} and the manifest says {listed}; build the bundle again")


def _names(specs: tuple[TensorSpec, ...]) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Types and shapes by name; engines have their own names for symbolic axes."""
    return {spec.name: (spec.dtype, tuple(None if isinstance(axis, str) else axis for axis in spec.shape)) for spec in specs}


def _check_model(model: Fields, entry: GraphEntry) -> None:
    if not {MODEL_VERSION} <= model.keys() <= MODEL_PLAIN:  # what OpenVINO does not take for ONNX, its other front ends try to read
        raise ValueError("it is not an ONNX file, or has functions")
    if len(model[MODEL_GRAPH]) != 1:
        raise ValueError("it has no graph, or several")
    opsets = [(_text(opset[1][-1]) if 1 in opset else "", _number(opset[2][-1])) for opset in map(_message, model[MODEL_OPSETS])]
    if opsets != [("", entry.opset)] or not 0 < entry.opset < 100:  # OpenVINO counts up to whatever stands there
        raise ValueError(f"it is of the operator sets {opsets} and the manifest says {entry.opset}")
    graph = _message(model[MODEL_GRAPH][0])
    if GRAPH_SPARSE in graph:
        raise ValueError("it has sparse tensors")
    if len(graph[GRAPH_NODES]) != entry.nodes:
        raise ValueError(f"it has {len(graph[GRAPH_NODES])} nodes and the manifest says {entry.nodes}")
    for field, listed in ((GRAPH_INPUTS, entry.inputs), (GRAPH_OUTPUTS, entry.outputs)):
        if (found := tuple(map(_tensor_spec, graph[field]))) != listed:
            raise ValueError(f"it has {found} where the manifest says {listed}")
    for node in graph[GRAPH_NODES]:
        _check_node(_message(node))
    for tensor in graph[GRAPH_TENSORS]:
        _check_tensor(_message(tensor), entry)


def _check_node(node: Fields) -> None:
    operator = _text(node[NODE_OPERATOR][-1]) if NODE_OPERATOR in node else ""
    if operator not in OPERATORS or any(_text(domain) for domain in node[NODE_DOMAIN]):
        raise ValueError(f"it has the operator {operator}")
    if not all(map(_bytes, (*node[NODE_INPUTS], *node[NODE_OUTPUTS]))):  # ONNX Runtime reads a missing bias all the same, and crashes
        raise ValueError(f"{operator} has an input or output without a name")
    for attribute in node[NODE_ATTRIBUTES]:
        _check_attribute(_message(attribute), operator)


def _check_attribute(attribute: Fields, operator: str) -> None:
    """Numbers of attributes are axes and small sizes; OpenVINO takes some of them for places in memory."""
    if not attribute.keys() <= ATTRIBUTE_PLAIN:
        raise ValueError(f"{operator} has a tensor or a graph as an attribute")
    name = _text(attribute[ATTRIBUTE_NAME][-1])
    values = [_signed(value) for field in (ATTRIBUTE_INTEGER, ATTRIBUTE_INTEGERS) for value in _numbers(attribute[field])]
    limit = AXES if name in ("axis", "axes", "perm") else SIZES
    if any(not -limit <= value < limit for value in values) or (name == "perm" and sorted(values) != list(range(len(values)))):
        raise ValueError(f"{operator} has {name} {values}")


def _tensor_spec(value: int | memoryview) -> TensorSpec:
    """ValueInfoProto { name: 1, type: 2 { tensor_type: 1 { elem_type: 1, shape: 2 { dim: 1 { dim_value: 1, dim_param: 2 } } } } }."""
    info = _message(value)
    tensor = _message(_message(info[2][-1])[1][-1])
    axes = map(_message, _message(tensor[2][-1])[1])
    shape = tuple(_text(axis[2][-1]) if 2 in axis else _number(axis[1][-1]) for axis in axes)
    return TensorSpec(_text(info[1][-1]), TYPE_NAMES[_number(tensor[1][-1])], shape)


def _check_tensor(tensor: Fields, entry: GraphEntry) -> None:
    """Engines allocate what the shape says; without this check, far more than is there."""
    shape = _numbers(tensor[TENSOR_DIMS])
    size = ITEM_SIZES[_number(tensor[TENSOR_TYPE][-1])] * math.prod(shape)
    if tensor.keys() & TENSOR_TYPED:
        raise ValueError("a tensor's values are not raw bytes")
    if not tensor[TENSOR_OUTSIDE]:
        held = len(_bytes(tensor[TENSOR_RAW][-1])) if TENSOR_RAW in tensor else 0
    else:
        held = _outside({_text(pair[1][-1]): _text(pair[2][-1]) for pair in map(_message, tensor[TENSOR_OUTSIDE])}, entry)
    if held != size:
        raise ValueError(f"a tensor of shape {shape} has {held} bytes")


def _outside(place: dict[str, str], entry: GraphEntry) -> int:
    """Bytes of a tensor in the weights file that the manifest names."""
    file = PurePosixPath(entry.graph.file).with_name(place["location"])
    if entry.data is None or file != PurePosixPath(entry.data.file) or place.keys() - {"location", "offset", "length"}:
        raise ValueError(f"it has weights in {place['location']!r}, of which the manifest does not know")
    offset, length = _count(place.get("offset", "0")), _count(place["length"])
    if offset + length > entry.data.size:
        raise ValueError(f"it has weights at {offset} of a file of {entry.data.size} bytes")
    return length


def _count(text: str) -> int:
    """Engines in C++ take less for a number than Python does."""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f"it has weights at {text!r}")
    return int(text)


def _fields(data: memoryview) -> Fields:
    """A message's fields by number; the last of several values counts where one is wanted."""
    found: Fields = defaultdict(list)
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = _varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError("it is not an ONNX file")
        if at > len(data) or number == 0:
            raise ValueError("it is not a whole ONNX file")
        found[number].append(value)
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of up to ten bytes, the low seven bits of each, and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError("it is not a whole ONNX file")


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _numbers(values: list[int | memoryview]) -> list[int]:
    """A repeated number, packed or not."""
    return [number for value in values for number in ([value] if isinstance(value, int) else _varints(value))]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it is not an ONNX file")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("it is not an ONNX file")
    return value


def _message(value: int | memoryview) -> Fields:
    return _fields(_bytes(value))


def _text(value: int | memoryview) -> str:
    return str(_bytes(value), "utf-8")
