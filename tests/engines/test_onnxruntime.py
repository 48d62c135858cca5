from pathlib import Path

import numpy as np
import onnx
import pytest
from clapsep.engines import EngineError, EngineOptions, EngineUnavailable, open_engine
from onnx import TensorProto, helper


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3])  # noqa: E731
    model = helper.make_model(
        helper.make_graph([helper.make_node("Add", ["a", "b"], ["sum"])], "g", [value("a"), value("b")], [value("sum")]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    path = tmp_path / "add.onnx"
    onnx.save(model, path)
    return path


def test_runs_with_the_provider_it_names(graph):
    engine = open_engine("onnxruntime", graph, EngineOptions(threads=1))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(engine.run({"a": x, "b": x})["sum"], 2 * x)
    assert engine.provider == "CPUExecutionProvider"
    assert engine.inputs[0].shape == ("batch", 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": np.zeros((1, 3), np.float32)}, "takes the inputs"),
        ({"a": np.zeros((1, 3), np.float32), "b": np.zeros((1, 4), np.float32)}, "'b' must be float32"),
        ({"a": np.zeros((1, 3), np.float64), "b": np.zeros((1, 3), np.float32)}, "'a' must be float32"),
        ({"a": np.zeros(3, np.float32), "b": np.zeros((1, 3), np.float32)}, "'a' must be float32"),
    ],
)
def test_wrong_inputs_are_named(graph, inputs, message):
    with pytest.raises(EngineError, match=message):
        open_engine("onnxruntime", graph).run(inputs)


def test_an_unknown_kind_lists_the_known_ones(graph):
    with pytest.raises(EngineUnavailable, match="choose one of: onnxruntime"):
        open_engine("tensorflow", graph)


@pytest.mark.parametrize("keep", [0, 10, 60])
def test_a_truncated_graph_is_an_engine_error(graph, keep):
    graph.write_bytes(graph.read_bytes()[:keep])
    with pytest.raises(EngineError, match="cannot load"):
        open_engine("onnxruntime", graph)


def test_weights_outside_the_bundle_are_refused(tmp_path):
    """ONNX external data may name any path; a hostile graph must not read files beside the bundle."""
    (tmp_path / "secret").write_bytes(bytes(12))
    inside = tmp_path / "graphs"
    inside.mkdir()
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "../secret"), ("offset", "0"), ("length", "12")):
        tensor.external_data.add(key=key, value=value)
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    body = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [info], [out], [tensor])
    (inside / "g.onnx").write_bytes(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString())
    with pytest.raises(EngineError, match="cannot load"):
        open_engine("onnxruntime", inside / "g.onnx")
