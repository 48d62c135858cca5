"""Steps `ceilings` and `operations` of `gpu_check.py`, and what share of the ceilings a measured batch reaches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gpu_task import Answer, Seen, Task, Verdict, gpu_state, need_torch, observe

# Large on a GPU, so that neither launches nor its caches count.
PRODUCT = {"cuda": (8192, 8192, 8192), "cpu": (2048, 1024, 2048)}  # rows, inner, columns
COPY = {"cuda": 1 << 30, "cpu": 64 << 20}  # bytes
HOST_COPY = 256 << 20  # bytes
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def ceilings(task: Task) -> Answer:
    """Rates of dense products, TF32 off, and of copies: on the device (bytes read and written), and from and to pinned host memory.

    `data["rates"]` has the medians: FLOP/s by type, and bytes/s by the name of the copy.
    """
    device = task["device"]
    need_torch(device)
    from products import host_copies, products

    seen: dict[str, Seen] = {}
    rates: dict[str, dict[str, float]] = {"products": {}, "copies": {}}
    for peer in products(device, PRODUCT[device], COPY[device]):
        found = seen[f"{peer.task} {peer.name}"] = observe(peer.run, task["seconds"])
        if peer.task == "product":
            rates["products"][peer.name] = 2 * math.prod(PRODUCT[device]) / found["median"] * 1000
        else:
            rates["copies"]["on device"] = 2 * COPY[device] / found["median"] * 1000
    for peer in host_copies(HOST_COPY) if device == "cuda" else ():
        found = seen[f"{peer.task} {peer.name}"] = observe(peer.run, task["seconds"])
        rates["copies"][peer.name] = HOST_COPY / found["median"] * 1000
    sizes = {"product": PRODUCT[device], "copy on device": COPY[device], "copy to and from host": HOST_COPY}
    said = [f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates["products"].items()]
    said += [f"copies {name} {rate / 1e9:.3g} GB/s" for name, rate in rates["copies"].items()]
    return ", ".join(said), {"unit": "ms", "rates": rates, "sizes": sizes, "calls": seen, "gpu": gpu_state()}


def operations(task: Task) -> Answer:
    """Floating-point operations of the network for one window, and bytes of its weights.

    The network is the separator between the transforms. The demo model's are counted by PyTorch, where its checkpoints are at hand,
    those of other bundles from the shapes in the ONNX graph.
    """
    from clapsep.runtime import Bundle

    bundle = Bundle.open(task["path"])
    flop, by = (demo_flop(), "PyTorch") if task.get("demo") else (onnx_flop(bundle.graph("separator")), "the graph's shapes")
    entry = bundle.manifest.graphs["separator"]
    weights = entry.graph.size + (entry.data.size if entry.data else 0)
    said = f"{flop / 1e9:.2f} GFLOP in each window, counted by {by}; {weights / 1e6:.1f} MB of weights"
    return said, {"flop": flop, "counted by": by, "weights": weights}


def demo_flop() -> float:
    """Of the demo model's separator module with LoRA merged, which is what our graph computes."""
    from clapsep.export import demo
    from clapsep.export.checkpoint import read_checkpoint
    from clapsep.export.family import open_model
    from products import operations_of

    model = open_model(read_checkpoint(demo.CLAP, "clap"), read_checkpoint(demo.CHECKPOINT, "checkpoint"))
    spec = next(spec for spec in model.graphs() if spec.name == "separator")
    return operations_of(lambda: spec.module(*(value[:1] for value in spec.inputs.values())))


def onnx_flop(path: Path) -> float:
    """Of a graph's products and convolutions at batch 1, two for each multiplication and addition.

    Raises:
        Verdict: skipped, as shapes are not known.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        axis = value.type.tensor_type.shape.dim[0]
        if axis.dim_param:
            axis.dim_value = 1
    del model.graph.value_info[:]  # which has the symbolic batch
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        shapes[value.name] = tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
    counted = {node.output[0]: _node_flop(node, shapes) for node in graph.node if node.op_type in PRODUCTS}
    unknown = [name for name, flop in counted.items() if not flop]
    if unknown:
        raise Verdict("skipped", f"{len(unknown)} of {len(counted)} products have shapes that are not known, {unknown[0]} first")
    return float(sum(counted.values()))


def _node_flop(node: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    """0 if a shape is not known."""
    first, second = (shapes.get(name, (0,)) for name in node.input[:2])
    out = math.prod(shapes.get(node.output[0], (0,)))
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Conv":  # weights [out, in / groups, ...]
        return 2 * out * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weights [in, out / groups, ...]
        return 2 * math.prod(first) * math.prod(second[1:])
    inner = first[0] if node.op_type == "Gemm" and flags.get("transA") else first[-1]
    return 2 * out * inner


def shares(milliseconds: float, batch: int, moved: dict[str, int], task: Task) -> dict[str, float]:
    """What part of a batch's time the machine needs at least, by what it would be busy with: products by type, copies.

    `moved` are the bytes that the batch copies `to device` and `from device`. Without measured ceilings there is none.
    """
    rates, network = task.get("rates") or {}, task.get("network") or {}
    seconds = milliseconds / 1000
    found = {}
    if network:
        found = {name: network["flop"] * batch / rate / seconds for name, rate in rates.get("products", {}).items()}
    copies = rates.get("copies", {})
    if network and "on device" in copies:
        found["weights read once"] = network["weights"] / copies["on device"] / seconds
    if set(moved) <= set(copies):
        found["host copies"] = sum(size / copies[name] for name, size in moved.items()) / seconds
    return found
