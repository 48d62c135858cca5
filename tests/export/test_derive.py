"""Graphs made out of others: the same numbers, the same weights file, float32 outside at every precision."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from clapsep.engines import PlanSettings, open_engine
from clapsep.engines.tensorrt_builder import build
from clapsep.export.derive import derive
from clapsep.export.graph import export_graph
from clapsep.export.precision import lower
from clapsep.export.specs import Cut, GraphSpec, Variant, Wrap
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(40, 300), nn.Linear(300, 6)

    def forward(self, x, y):
        h = self.first(x).relu()
        return self.second(h * y), h


class Before(nn.Module):
    def forward(self, wave):
        return wave * 2, wave.sum(-1, keepdim=True)


class After(nn.Module):
    def forward(self, out, total):
        return out + total


@pytest.fixture(params=["fp32", "fp16"])
def source(request, tmp_path):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 40), "y": torch.rand(2, 300)}
    entry = export_graph(GraphSpec("net", Network().eval(), inputs, ("out",), ("h",)), tmp_path, {"precision": "fp32"})
    if request.param == "fp16":
        from clapsep.export.graph import inspect_graph

        feeds = {name: value.numpy() for name, value in inputs.items()}
        kept = lower(tmp_path / "graphs/net.onnx", [feeds]).kept
        entry = inspect_graph(tmp_path, "net", "fp16", tuple(kept))
    return tmp_path, {"net": entry}


def run(root, name, **inputs):
    return open_engine("onnxruntime", root / f"graphs/{name}.onnx").run(inputs)


def test_cut_in_two(source, rng):
    root, sources = source
    for cut in (Cut("front", "net", ("x",), ("h",)), Cut("back", "net", ("h", "y"), ("out",))):
        entry = derive(cut, root, sources, {"family": "f"})
        assert entry.data == sources["net"].data
        assert (root / entry.graph.file).stat().st_size < 5000
        assert {t.dtype for t in (*entry.inputs, *entry.outputs)} == {"float32"}
    x, y = rng.standard_normal((3, 40)).astype(np.float32), rng.random((3, 300)).astype(np.float32)
    whole, h = run(root, "net", x=x, y=y), run(root, "front", x=x)
    np.testing.assert_allclose(run(root, "back", y=y, **h)["out"], whole["out"], atol=1e-6 if sources["net"].precision == "fp32" else 2e-3)


def test_wrapped(source, rng):
    root, sources = source
    before = GraphSpec("b", Before(), {"wave": torch.randn(2, 40)}, ("x", "total"))
    after = GraphSpec("a", After(), {"out": torch.randn(2, 6), "total": torch.randn(2, 1)}, ("target",))
    entry = derive(Wrap("wrapped", "net", before, after), root, sources, {})
    assert [t.name for t in entry.inputs] == ["wave", "y"]
    assert [t.name for t in entry.outputs] == ["target"]
    assert entry.data == sources["net"].data
    wave, y = rng.standard_normal((3, 40)).astype(np.float32), rng.random((3, 300)).astype(np.float32)
    wanted = run(root, "net", x=2 * wave, y=y)["out"] + wave.sum(-1, keepdims=True)
    np.testing.assert_allclose(run(root, "wrapped", wave=wave, y=y)["target"], wanted, atol=2e-5 if entry.precision == "fp32" else 2e-2)
    nodes = [node for node in ir.load(root / entry.graph.file).graph if str(node.name).startswith(("before_", "after_"))]
    outside = [value.dtype for node in nodes for value in (*node.inputs, *node.outputs) if value.dtype != ir.DataType.INT64]
    assert outside
    assert set(outside) == {ir.DataType.FLOAT}, "what is around the network is never lowered"


def test_a_variant_shares_the_weights(tmp_path, rng):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return self.linear(x).sum(1)

    module = Rows().eval()
    specs = {n: GraphSpec("rows", module, {"x": torch.randn(2, n, 64)}, ("out",)) for n in (9, 3)}
    sources = {"rows": export_graph(specs[9], tmp_path, {"precision": "fp32"})}
    entry = derive(Variant("few", "rows", specs[3]), tmp_path, sources, {})
    assert entry.data == sources["rows"].data
    assert entry.inputs[0].shape == ("batch", 3, 64)
    external = [t.name for t in onnx.load(tmp_path / entry.graph.file, load_external_data=False).graph.initializer if t.external_data]
    assert len(external) == 1, "the matrix is not written again"
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path, "few", x=x)["out"], module(torch.from_numpy(x)).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("graph", ["mixture_encoder", "film", "mask_decoder", "separator_waveform"])
def test_the_demo_models_graphs_become_plans(demo_bundle, tmp_path, graph):
    """By the real compiler, without a GPU; what it parses it must also build."""
    report = build(
        "tensorrt-rtx", demo_bundle / f"graphs/{graph}.onnx", tmp_path / "p.plan", PlanSettings("fp32", 2, ("8.6",)), lambda _: None
    )
    assert report.size > 1000


def test_compilers_make_few_layers_of_the_transforms(demo_bundle, tmp_path):
    """Slices and paddings would be some thirty layers each."""
    layers = {}
    for graph in ("separator", "separator_waveform"):
        path = demo_bundle / f"graphs/{graph}.onnx"
        layers[graph] = build("tensorrt-rtx", path, tmp_path / graph, PlanSettings("fp32", 2, ("8.6",)), lambda _: None).layers
    assert layers["separator_waveform"] - layers["separator"] < 200
