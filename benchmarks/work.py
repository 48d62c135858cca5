"""What a bundle's graphs have to do for one row: operations in products, bytes of weights and activations, launches; and floors from rates.

Usage: python benchmarks/work.py BUNDLE.clapsep [--half TFLOP/S] [--single TFLOP/S] [--bandwidth TB/S] [--json FILE]

Counted from the ONNX files; nothing is run. The default rates are an H200's data sheet: 989 TFLOP/s dense float16, 67 float32, 4.8 TB/s.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from clapsep.runtime import Bundle
from onnx import TensorProto, helper, shape_inference

CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = ("MatMul", "Gemm", *CONVOLUTIONS)
FREE = ("Reshape", "Unsqueeze", "Squeeze", "Identity", "Cast", "Constant")  # no kernel of their own in a compiled graph
HALF = 2


def shapes_of(path: Path) -> tuple[onnx.GraphProto, dict[str, tuple[list[int], int]]]:
    """A graph, and shape with batch 1 and bytes of an element of every value."""
    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]  # which has the symbolic batch
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    found = {v.name: ([d.dim_value for d in v.type.tensor_type.shape.dim], _bytes(v.type.tensor_type.elem_type)) for v in values}
    return graph, found | {t.name: (list(t.dims), _bytes(t.data_type)) for t in graph.initializer}


def _bytes(kind: int) -> int:
    return helper.tensor_dtype_to_np_dtype(kind).itemsize if kind != TensorProto.UNDEFINED else 4


def work(path: Path) -> dict[str, Any]:
    """Operations by the width of the type that they are done in, weights, activations, and kernels before any fusion.

    Raises:
        ValueError: a product's shapes are not known.
    """
    graph, shapes = shapes_of(path)
    weights = {t.name for t in graph.initializer}
    operations: Counter[str] = Counter()
    moved = around_products = 0
    for node in graph.node:
        names = [name for name in (*node.input, *node.output) if name in shapes and name not in weights]
        size = sum(math.prod(shapes[name][0]) * shapes[name][1] for name in names)
        moved += 0 if node.op_type in FREE else size
        if node.op_type in PRODUCTS:
            if any(0 in shapes.get(name, ([0], 0))[0] for name in (*node.input[:2], *node.output)):
                raise ValueError(f"{path.name}: the shapes of the product {node.output[0]} are not known")
            around_products += size
            kind = "half" if shapes[node.output[0]][1] == HALF else "single"
            operations[kind] += 2 * _multiply_adds(node, *(shapes[name][0] for name in (*node.input[:2], node.output[0])))
    kinds = Counter(node.op_type for node in graph.node)
    used = {name for node in graph.node for name in node.input} & weights
    return {
        "nodes": len(graph.node),
        "products": sum(kinds[kind] for kind in PRODUCTS),
        "kernels unfused": sum(count for kind, count in kinds.items() if kind not in FREE),
        "operations": dict(operations),
        "weight bytes": sum(math.prod(shapes[name][0]) * shapes[name][1] for name in used),
        "activation bytes": moved,
        "activation bytes around products": around_products,
    }


def _multiply_adds(node: onnx.NodeProto, x: list[int], weight: list[int], out: list[int]) -> int:
    """Of a product of operands with these shapes, borders counted as if they were inside."""
    if node.op_type in CONVOLUTIONS:  # every result of a convolution, and every input of a transposed one, meets a kernel
        return math.prod(x if node.op_type == "ConvTranspose" else out) * math.prod(weight[1:])
    turned = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(out) * x[-2 if turned else -1]


def floor(row: dict[str, Any], half: float, single: float, bandwidth: float) -> dict[str, float]:
    """Milliseconds: arithmetic, weights read once, and activations if only products touch memory, or every node does."""
    operations = row["operations"]
    arithmetic = operations.get("half", 0) / half / 1e12 + operations.get("single", 0) / single / 1e12
    return {
        "arithmetic": 1e3 * arithmetic,
        "weights": 1e3 * row["weight bytes"] / bandwidth / 1e12,
        "activations, fused": 1e3 * row["activation bytes around products"] / bandwidth / 1e12,
        "activations, unfused": 1e3 * row["activation bytes"] / bandwidth / 1e12,
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    header = (
        "graph",
        "nodes",
        "products",
        "GFLOP half / single",
        "weights MB",
        "activations MB, fused / not",
        "ms: arithmetic, weights, activations",
    )
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for name, row in rows.items():
        flop, ms = row["operations"], row["floor ms"]
        moved = [row[key] / 1e6 for key in ("weight bytes", "activation bytes around products", "activation bytes")]
        cells = [row["nodes"], row["products"], f"{flop.get('half', 0) / 1e9:.2f} / {flop.get('single', 0) / 1e9:.2f}"]
        cells += [f"{moved[0]:.0f}", f"{moved[1]:.0f} / {moved[2]:.0f}"]
        cells += [f"{ms['arithmetic']:.3f}, {ms['weights']:.3f}, {ms['activations, fused']:.3f} to {ms['activations, unfused']:.3f}"]
        print(f"| `{name}` | {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--half", type=float, default=989)
    parser.add_argument("--single", type=float, default=67)
    parser.add_argument("--bandwidth", type=float, default=4.8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    rows = {name: work(bundle.graph(name)) for name in bundle.manifest.graphs}
    for row in rows.values():
        row["floor ms"] = floor(row, args.half, args.single, args.bandwidth)
    show(rows)
    if args.json:
        rates = {"half": args.half, "single": args.single, "bandwidth": args.bandwidth}
        args.json.write_text(json.dumps({"bundle": args.bundle.name, "rates": rates, "graphs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
