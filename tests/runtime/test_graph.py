"""Graphs that a hostile manifest vouches for."""

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest
from clapsep.engines import Engine, EngineError
from clapsep.engines.engine import TensorSpec
from clapsep.runtime import Bundle, Separator
from clapsep.runtime.errors import BundleError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

FILM = "graphs/film.onnx"


@pytest.fixture
def copy(demo_bundle, tmp_path):
    return shutil.copytree(demo_bundle, tmp_path / "copy.clapsep")


def put(bundle, content, **changes):
    """Put a file in the place of the graph `film`; the manifest says what is there."""
    (bundle / FILM).write_bytes(content)
    data = json.loads((bundle / "manifest.json").read_text())
    data["graphs"]["film"]["graph"].update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    data["graphs"]["film"].update(changes)
    (bundle / "manifest.json").write_text(json.dumps(data))


def edit(bundle, change):
    model = onnx.load(str(bundle / FILM), load_external_data=False)
    change(model)
    put(bundle, model.SerializeToString(), nodes=len(model.graph.node))


def add_loop(model):
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", [], ["x"], body=body))


def add_body(model):
    model.graph.node.append(helper.make_node("Relu", [], ["x"], body=helper.make_graph([], "body", [], [])))


def add_attribute(name, value):
    return lambda model: model.graph.node.append(helper.make_node("Relu", [], ["x"], **{name: value}))


def add_function(model):
    model.functions.append(helper.make_function("", "f", ["a"], ["b"], [], []))


def enlarge(model):
    model.graph.initializer[0].dims[0] = 1 << 62


def outside(key, value):
    def change(model):
        for entry in model.graph.initializer[0].external_data:
            if entry.key == key:
                entry.value = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_loop, "the operator Loop"),  # ran for ever in both engines; without a body, OpenVINO crashed
        (add_body, "Relu has a tensor or a graph as an attribute"),
        (add_function, "has functions"),
        (lambda m: m.graph.node[0].input.append(""), "without a name"),  # ONNX Runtime crashed on a LayerNormalization's
        (
            lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1 << 40),
            "where the manifest says",
        ),  # std::bad_alloc
        (add_attribute("axis", 1 << 62), "Relu has axis"),  # OpenVINO crashed now and then
        (add_attribute("perm", [0, 0]), "Relu has perm"),
        (lambda m: m.ClearField("ir_version"), "not an ONNX file"),
        (enlarge, "a tensor of shape"),  # std::bad_alloc in OpenVINO
        (lambda m: setattr(m.opset_import[0], "version", (1 << 32) - 1), "operator sets"),  # OpenVINO counted
        (lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"), "the operator Gemm|the operator MatMul"),
        (lambda m: m.graph.node.append(helper.make_node("ConstantOfShape", ["s"], ["x"])), "the operator ConstantOfShape"),
        (outside("location", "/etc/passwd"), "weights in '/etc/passwd'|Invalid name"),
        (outside("location", "text_encoder.onnx.data"), "of which the manifest does not know"),
        (outside("offset", "-4"), "weights at '-4'"),
        (outside("offset", "99999999999"), "weights at 99999999999 of a file"),
        (outside("length", "8"), "a tensor of shape"),
        (lambda m: m.graph.initializer[0].float_data.append(1), "not raw bytes"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 8), "not a graph that a bundle may have"),
    ],
)
def test_graphs_that_are_not_plain_are_refused_before_an_engine_sees_them(copy, change, words):
    edit(copy, change)
    with pytest.raises(BundleError, match=words):
        Bundle.open(copy).graph("film")


@pytest.mark.parametrize(
    "content",
    [b"", b"not ONNX at all", b'node { op: "x" }', b"\x3a\xff\xff\xff\xff\xff\x7f", b"\x3a\x00" * 2, b"\xff" * 20, b"\x3b", b"\x38\x01"],
)
def test_files_that_are_no_graphs(copy, content):
    """OpenVINO tried its front ends for other formats on them."""
    put(copy, content)
    with pytest.raises(BundleError, match="not a graph that a bundle may have"):
        Bundle.open(copy).graph("film")


def test_node_count(copy):
    put(copy, (copy / FILM).read_bytes(), nodes=2)
    with pytest.raises(BundleError, match="1 nodes and the manifest says 2"):
        Bundle.open(copy).graph("film")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_harmless_to_the_check(copy, demo_bundle, data):
    content = bytearray((demo_bundle / FILM).read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    put(copy, bytes(content))
    try:
        Bundle.open(copy).graph("film")
    except BundleError:
        pass


def test_an_engine_with_other_outputs_than_the_manifest_says(demo_bundle, monkeypatch):
    """Ended as KeyError: 'film'; plans are not ONNX files and can still have them."""
    monkeypatch.setattr(Separator, "_open_file", staticmethod(lambda *_: Liar(np.zeros((1, 2), np.float32))))
    with pytest.raises(BundleError, match=r"film\.onnx has the inputs"):
        Separator(demo_bundle).engine("film")


class Liar(Engine):
    """An engine whose graph declares one thing and gives another."""

    kind, library, install, devices = "liar", "numpy", "", ("cpu",)
    inputs = outputs = (TensorSpec("x", "float32", ("batch", 2)),)

    def __init__(self, result):
        self.result = result

    def _run(self, inputs):  # noqa: ARG002
        return {"x": self.result}


def test_outputs_are_what_the_graph_declares():
    x = np.zeros((1, 2), np.float32)
    assert Liar(x).run({"x": x})["x"] is x
    for wrong in (np.zeros((2, 2), np.float32), np.zeros((1, 3), np.float32), np.zeros((1, 2)), np.float32(0)):
        with pytest.raises(EngineError, match="output 'x' is .* and the graph declares"):
            Liar(wrong).run({"x": x})
