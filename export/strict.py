"""Run a typed ONNX graph exactly as it is written: every tensor has, and is rounded to, the type that the graph declares.

ONNX Runtime's CPU engine computes chains of float16 nodes in float32 and so hides both rounding and overflow. This interpreter
does what tensor cores do: products are accumulated in float32, every result is rounded. It also sees each tensor on the way,
which is how activation ranges are measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor
from torch.nn import functional as F

from ..engines.engine import Arrays, Engine, EngineOptions, TensorSpec
from ..runtime.errors import ExportError
from ..runtime.separator import Separator

Observer = Callable[[ir.Node, list[Tensor]], None]
Attributes = Mapping[str, Any]
Operator = Callable[[Attributes, list[Any]], Tensor]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


def _matmul(_: Attributes, x: list[Tensor]) -> Tensor:
    return (_wide(x[0]) @ _wide(x[1])).to(x[0].dtype)


def _gemm(a: Attributes, x: list[Tensor]) -> Tensor:
    left, right = (_wide(m.T if a.get(flag) else m) for m, flag in zip(x, ("transA", "transB"), strict=False))
    product = (left @ right) * a.get("alpha", 1.0)
    return (product + _wide(x[2]) * a.get("beta", 1.0) if len(x) > 2 else product).to(x[0].dtype)


def _layer_norm(a: Attributes, x: list[Tensor]) -> Tensor:
    """`stash_type` 1: statistics in float32 whatever the type outside."""
    size, wide = x[0].shape[a.get("axis", -1) :], [_wide(v) for v in x]
    return F.layer_norm(wide[0], size, wide[1], wide[2] if len(wide) > 2 else None, a.get("epsilon", 1e-5)).to(x[0].dtype)


def _reshape(_: Attributes, x: list[Tensor]) -> Tensor:
    shape = x[1].tolist()
    return x[0].reshape([x[0].shape[i] if n == 0 else n for i, n in enumerate(shape)])


def _gather(a: Attributes, x: list[Tensor]) -> Tensor:
    axis, index = a.get("axis", 0) % x[0].ndim, x[1]
    picked = x[0].index_select(axis, index.reshape(-1) % x[0].shape[axis])  # negative ones count from the end
    return picked.reshape(*x[0].shape[:axis], *index.shape, *x[0].shape[axis + 1 :])


def _cast(a: Attributes, x: list[Tensor]) -> Tensor:
    return x[0].to(torch.from_numpy(np.zeros(1, ir.DataType(a["to"]).numpy())).dtype)


def _padded(a: Attributes, x: Tensor) -> Tensor:
    """With the zeros around it that a convolution or a pool asks for."""
    rank = x.ndim - 2
    pads = list(a.get("pads", [0] * 2 * rank))
    if a.get("auto_pad", "NOTSET") != "NOTSET" or a.get("ceil_mode", 0) or (any(pads) and not a.get("count_include_pad", 1)):
        raise ExportError(f"a convolution or pool with {dict(a)} cannot be run strictly; add it to export/strict.py")
    return F.pad(_wide(x), [size for axis in reversed(range(rank)) for size in (pads[axis], pads[rank + axis])])


def _conv(a: Attributes, x: list[Tensor]) -> Tensor:
    weights, rank = [_wide(v) for v in x[1:]], x[0].ndim - 2
    strides, dilations = (tuple(a.get(name, [1] * rank)) for name in ("strides", "dilations"))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return convolve(_padded(a, x[0]), *weights, stride=strides, dilation=dilations, groups=a.get("group", 1)).to(x[0].dtype)


def _conv_transpose(a: Attributes, x: list[Tensor]) -> Tensor:
    if any(a.get("pads", ())) or any(a.get("output_padding", ())) or "output_shape" in a:
        raise ExportError(f"a ConvTranspose with {dict(a)} cannot be run strictly; add it to export/strict.py")
    wide, rank = [_wide(v) for v in x], x[0].ndim - 2
    strides, dilations = (tuple(a.get(name, [1] * rank)) for name in ("strides", "dilations"))
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    return convolve(*wide, stride=strides, dilation=dilations, groups=a.get("group", 1)).to(x[0].dtype)


def _average_pool(a: Attributes, x: list[Tensor]) -> Tensor:
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x[0].ndim - 3]
    return pool(_padded({"count_include_pad": 0, **a}, x[0]), tuple(a["kernel_shape"]), tuple(a["strides"])).to(x[0].dtype)


# The operators that carry the load; ONNX's own reference evaluator runs the rest.
OPERATORS: dict[str, Operator] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "Reshape": _reshape,
    "Gather": _gather,
    "Cast": _cast,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "AveragePool": _average_pool,
    "LeakyRelu": lambda a, x: F.leaky_relu(x[0], a.get("alpha", 0.01)),
    "Add": lambda _, x: x[0] + x[1],
    "Sub": lambda _, x: x[0] - x[1],
    "Mul": lambda _, x: x[0] * x[1],
    "Div": lambda _, x: torch.div(x[0], x[1], rounding_mode=None if x[0].is_floating_point() else "trunc"),
    "Relu": lambda _, x: x[0].relu(),
    "Tanh": lambda _, x: x[0].tanh(),
    "Sigmoid": lambda _, x: x[0].sigmoid(),
    "Gelu": lambda a, x: F.gelu(x[0], approximate=a.get("approximate", "none")),
    "Softmax": lambda a, x: _wide(x[0]).softmax(a.get("axis", -1)).to(x[0].dtype),
    "Transpose": lambda a, x: x[0].permute(*a.get("perm", range(x[0].ndim - 1, -1, -1))),
}


class StrictGraph:
    """A graph with its weights, ready to be interpreted."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        constants = {str(name): value.const_value for name, value in model.graph.initializers.items()}
        self._constants = {name: _tensor(value.numpy()) for name, value in constants.items() if value is not None}

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, NDArray[Any]], observe: Observer | None = None) -> dict[str, NDArray[Any]]:
        """Run once; `observe` is shown every node with its outputs.

        Raises:
            ExportError: an operator that neither this file nor ONNX's reference knows.
        """
        graph = self._model.graph
        values: dict[str, Any] = {**self._constants, **{name: _tensor(value) for name, value in inputs.items()}}
        wanted = [str(output.name) for output in graph.outputs]
        left = Counter(str(value.name) for node in graph for value in node.inputs if value is not None) + Counter(wanted)
        for node in graph:
            names = [None if value is None else str(value.name) for value in node.inputs]
            results = self._execute(node, [None if name is None else values[name] for name in names])
            values.update((str(value.name), result) for value, result in zip(node.outputs, results, strict=False))
            if observe is not None:
                observe(node, results)
            for name in filter(None, names):  # what nobody needs any more is freed
                left[name] -= 1
                if not left[name] and name not in self._constants:
                    values.pop(name, None)
        return {name: values[name].numpy() for name in wanted}

    def _execute(self, node: ir.Node, x: list[Any]) -> list[Tensor]:
        if node.op_type in OPERATORS and not node.domain and None not in x:
            return [OPERATORS[node.op_type]({name: a.value for name, a in node.attributes.items()}, x)]  # pyright: ignore[reportAttributeAccessIssue]
        return self._reference(node, x)

    def _reference(self, node: ir.Node, x: list[Any]) -> list[Tensor]:
        proto = ir.serde.serialize_node(node)
        names = [name for name in proto.input if name]
        given, made = ([helper.make_empty_tensor_value_info(name) for name in group] for group in (names, proto.output))
        opsets = [helper.make_opsetid(domain, version) for domain, version in self._model.opset_imports.items()]
        single = helper.make_model(helper.make_graph([proto], str(node.name), given, made), opset_imports=opsets)
        arrays = (value.numpy() for value in x if value is not None)
        try:
            results = ReferenceEvaluator(single).run(None, dict(zip(names, arrays, strict=True)))
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise ExportError(f"operator {node.op_type} cannot be run strictly ({error}); add it to export/strict.py") from error
        return [_tensor(np.asarray(result)) for result in results]  # pyright: ignore[reportGeneralTypeIssues]


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))


class StrictEngine(Engine):
    """The interpreter in the place of an engine: what a graph gives when every value really has its declared type."""

    kind, library, install, devices = "strict", "torch", "pip install 'clapsep-export[export]'", ("cpu",)

    def __init__(self, path: Path, options: EngineOptions) -> None:  # noqa: ARG002
        model = ir.load(path)
        self._graph, self.provider = StrictGraph(model), "PyTorch CPU"
        self.inputs, self.outputs = _specs(model.graph.inputs), _specs(model.graph.outputs)

    def _run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        return self._graph.run(inputs)


def _specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    shapes = [[size if isinstance(size, int) else str(size) for size in value.shape or ()] for value in values]
    types = [value.dtype.numpy().name for value in values if value.dtype is not None]
    return tuple(TensorSpec(str(v.name), kind, tuple(shape)) for v, kind, shape in zip(values, types, shapes, strict=True))


class StrictSeparator(Separator):
    """A Separator whose graphs the interpreter runs; gates and benchmarks use it to judge float16 graphs."""

    engine_name, precision = "strict", "fp16"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    _open_file = staticmethod(lambda _kind, path, options: StrictEngine(path, options))
