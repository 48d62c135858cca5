"""Mixed precision: what stays in float32, where casts stand, and that overflow which engines hide is seen."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from clapsep.export.precision import HEADROOM, MAXIMUM, Policy, convert, find_sensitive, keep, lower, measure_ranges
from clapsep.export.strict import OPERATORS, StrictGraph
from clapsep.runtime.errors import ExportError
from clapsep.runtime.metrics import snr
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

SIZE = 8


def graph(nodes, constants, folder: Path | None = None, outputs=("y",), inputs=("x",)):
    """A model from (operator, inputs, output, attributes) rows over float tensors [batch, 8]."""
    made = [helper.make_node(op, i, [o], name=f"{op}_{o}", **a) for op, i, o, a in nodes]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", SIZE])  # noqa: E731
    constants = {name: np.asarray(array) for name, array in constants.items()}
    body = helper.make_graph(
        made, "g", [value(n) for n in inputs], [value(n) for n in outputs], [numpy_helper.from_array(a, n) for n, a in constants.items()]
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    if folder is None:
        return ir.from_proto(model)
    onnx.save(model, folder / "g.onnx", save_as_external_data=True, location="g.onnx.data", size_threshold=0)
    return folder / "g.onnx"


def weights(seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal((SIZE, SIZE)) * scale).astype(np.float32)


X = {"x": np.random.default_rng(1).standard_normal((2, SIZE)).astype(np.float32)}
CHAIN = [("MatMul", ["x", "w"], "a", {}), ("Relu", ["a"], "b", {}), ("MatMul", ["b", "v"], "y", {})]
CONSTANTS = {"w": weights(2), "v": weights(3)}


def kinds(model):
    return {str(node.name): {str(value.dtype) for value in node.outputs} for node in model.graph}


def casts(model):
    return [node for node in model.graph if node.op_type == "Cast"]


def test_inputs_and_outputs_keep_name_and_type_and_the_inside_is_half(tmp_path):
    model = graph(CHAIN, CONSTANTS)
    assert convert(model, keep(model.graph, {}, Policy())) == len(casts(model)) == 2
    ir.save(model, tmp_path / "h.onnx")
    onnx.checker.check_model(str(tmp_path / "h.onnx"), full_check=True)
    session = ort.InferenceSession(str(tmp_path / "h.onnx"), providers=["CPUExecutionProvider"])
    assert [(v.name, v.type) for v in (*session.get_inputs(), *session.get_outputs())] == [("x", "tensor(float)"), ("y", "tensor(float)")]
    assert {n: k for n, k in kinds(model).items() if not n.startswith("cast")} == {
        f"{op}_{o}": {"FLOAT16"} for op, _, o, _ in CHAIN[:2]
    } | {"MatMul_y": {"FLOAT16"}}
    assert all(str(value.dtype) == "FLOAT16" for value in model.graph.initializers.values())
    assert snr(StrictGraph(graph(CHAIN, CONSTANTS)).run(X)["y"], session.run(None, X)[0]) > 50


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_what_comes_near_the_limit_stays_in_float32(factor):
    model = graph(CHAIN, CONSTANTS)
    kept = keep(model.graph, {"a": factor * MAXIMUM / HEADROOM, "b": 1.0}, Policy())
    assert kept == ({"MatMul_a": "range", "Relu_b": "range"} if factor > 1 else {}), "what makes the value, and what would take it cast"


def test_a_normalisation_of_large_values_stays_in_float32():
    """Its input fits, the sum of squares inside would not: an engine that ignores stash_type overflows."""
    rows = [
        ("MatMul", ["x", "w"], "a", {}),
        ("LayerNormalization", ["a", "one", "zero"], "n", {"axis": -1}),
        ("MatMul", ["n", "v"], "y", {}),
    ]
    constants = CONSTANTS | {"one": np.ones(SIZE, np.float32), "zero": np.zeros(SIZE, np.float32)}
    quiet, loud = ({"x": X["x"] * scale} for scale in (1, 30))
    for feeds, kept in ((quiet, {}), (loud, {"LayerNormalization_n": "range"})):
        model = graph(rows, constants)
        ranges, _ = measure_ranges(model, [feeds])
        assert max(ranges["a"], ranges["n"]) * HEADROOM < MAXIMUM
        assert keep(model.graph, ranges, Policy()) == kept


@pytest.mark.parametrize("value", [1e-12, 1e6, -7e4])
def test_constants_that_float16_cannot_hold(value):
    rows = [("MatMul", ["x", "w"], "a", {}), ("Add", ["a", "c"], "b", {}), ("MatMul", ["b", "v"], "y", {})]
    model = graph(rows, CONSTANTS | {"c": np.float32(value)})
    assert keep(model.graph, {}, Policy()) == {"Add_b": "constant"}


def test_quotients_and_the_edges_stay_and_moves_follow():
    rows = [
        ("Mul", ["x", "s"], "e", {}),  # straight on the input
        ("MatMul", ["e", "w"], "a", {}),
        ("Div", ["a", "s"], "d", {}),
        ("Identity", ["d"], "i", {}),  # between two float32 nodes
        ("Div", ["i", "s"], "f", {}),
        ("MatMul", ["f", "v"], "m", {}),
        ("Sigmoid", ["m"], "y", {}),  # straight before the output
    ]
    model = graph(rows, CONSTANTS | {"s": np.full(SIZE, 2, np.float32)})
    kept = keep(model.graph, {}, Policy())
    assert kept == {"Mul_e": "edge", "Div_d": "operator", "Identity_i": "between", "Div_f": "operator", "Sigmoid_y": "edge"}
    assert convert(model, kept) == 4  # around each of the two products
    assert keep(graph(rows, CONSTANTS | {"s": np.full(SIZE, 2, np.float32)}).graph, {}, Policy(edges=False)).keys() == {
        "Div_d",
        "Identity_i",
        "Div_f",
    }


def test_one_cast_serves_all_users():
    rows = [("MatMul", ["x", "w"], "a", {}), ("MatMul", ["x", "v"], "b", {}), ("MatMul", ["a", "u"], "c", {}), ("Add", ["b", "c"], "y", {})]
    model = graph(rows, CONSTANTS | {"u": weights(5)})
    convert(model, [])
    assert len(casts(model)) == 2
    names = [str(node.name) for node in model.graph]
    assert names.index("cast_x_float16") < names.index("MatMul_a")


def test_a_constant_with_both_kinds_of_users_is_stored_in_both():
    rows = [("MatMul", ["x", "w"], "a", {}), ("MatMul", ["a", "w"], "y", {})]
    model = graph(rows, {"w": weights()})
    convert(model, ["MatMul_y"])
    assert {name: str(value.dtype) for name, value in model.graph.initializers.items()} == {"w": "FLOAT", "w_float16": "FLOAT16"}


def test_the_interpreter_sees_the_overflow_that_onnx_runtime_hides(tmp_path):
    """300 · 300 · 0.001 is 90 in float32, infinite in float16."""
    rows = [("Mul", ["x", "c"], "a", {}), ("Mul", ["a", "c"], "b", {}), ("Mul", ["b", "d"], "y", {})]
    model = graph(rows, {"c": np.float32(300), "d": np.float32(0.001)})
    convert(model, [])
    ir.save(model, tmp_path / "h.onnx")
    ones = {"x": np.ones((1, SIZE), np.float32)}
    hidden = ort.InferenceSession(str(tmp_path / "h.onnx"), providers=["CPUExecutionProvider"]).run(None, ones)[0]
    assert np.allclose(hidden, 90, rtol=1e-2)
    assert np.isinf(StrictGraph(model).run(ones)["y"]).all()
    assert measure_ranges(model, [ones], ir.DataType.FLOAT16)[1] > 0


def test_lowering_avoids_the_overflow_that_its_worst_signal_causes(tmp_path):
    """Activations reach 2e5 on a hard signal only: the first, ordinary one would not tell."""
    path = graph(CHAIN, {"w": weights(2, 1e3), "v": weights(3, 1e-3)}, tmp_path)
    calm, hard = {"x": X["x"] * 0.01}, {"x": X["x"] * 100}
    naive = ir.load(path)
    convert(naive, [])
    assert not np.isfinite(StrictGraph(naive).run(hard)["y"]).all()
    wanted = StrictGraph(ir.load(path)).run(hard)["y"].copy()
    lowered = lower(path, [calm], [hard])
    assert set(lowered.kept.values()) == {"range"}
    assert lowered.not_finite == 0
    assert lowered.largest * HEADROOM <= 1
    assert snr(wanted, StrictGraph(ir.load(path)).run(hard)["y"]) > 45
    assert {p.name for p in tmp_path.iterdir()} == {"g.onnx", "g.onnx.data"}


def test_bisection_finds_the_node_that_loses_accuracy(tmp_path):
    """Adding 2000 and taking it away again costs 11 bits of an ordinary value; no range and no operator tells."""
    rows = [
        ("MatMul", ["x", "w"], "a", {}),
        ("Add", ["a", "c"], "b", {}),
        ("Sub", ["b", "c"], "d", {}),
        ("MatMul", ["d", "v"], "e", {}),
        ("MatMul", ["e", "v"], "y", {}),
    ]
    path = graph(rows, CONSTANTS | {"c": np.float32(2000)}, tmp_path)
    lowered = lower(path, [X])
    assert {name for name, why in lowered.kept.items() if why == "accuracy"} >= {"Add_b"}
    assert "MatMul_e" not in lowered.kept
    assert lowered.snr_db > 46


def test_bisection_stops_where_nothing_is_wrong():
    asked = []

    def noise(half):
        asked.append(len(half))
        return sum(1e-3 for name in half if name == "bad")

    assert find_sensitive(["a", "b", "bad", "c"], noise, 1e-4) == ["bad"]
    assert max(asked) == 4
    assert find_sensitive(["a", "b"], noise, 1e-4) == []


def test_operators_of_the_interpreter_agree_with_onnx_own_reference():
    """Each of them, in float32 and float16, against an implementation that is not ours."""
    random = np.random.default_rng(3)
    x = random.standard_normal((2, SIZE)).astype(np.float32)
    image, kernel = random.standard_normal((2, 4, 6, 5)).astype(np.float32), random.standard_normal((4, 2, 3, 2)).astype(np.float32)
    cases = {
        "Conv": ([image, kernel, x[0, :4]], {"group": 2, "pads": [1, 0, 2, 1], "strides": [1, 2], "dilations": [2, 1]}),
        "ConvTranspose": ([image, kernel, x[0, :2]], {"strides": [1, 2]}),
        "AveragePool": ([image], {"kernel_shape": [2, 3], "strides": [2, 1], "pads": [1, 0, 0, 1], "count_include_pad": 1}),
        "MatMul": ([x, weights()], {}),
        "Gemm": ([x, weights(), weights()[0]], {"transB": 1, "alpha": 0.5}),
        "LayerNormalization": ([x, weights()[0], weights()[1]], {"axis": -1, "epsilon": 1e-3}),
        "Reshape": ([x, np.array([0, 2, -1])], {}),
        "Gather": ([x, np.array([[1, 0], [3, 3]])], {"axis": 1}),
        "Cast": ([x], {"to": TensorProto.DOUBLE}),
        "Transpose": ([x], {"perm": [1, 0]}),
        "Softmax": ([x], {"axis": -1}),
        "Gelu": ([x], {}),
        **{name: ([x, weights()[:2]], {}) for name in ("Add", "Sub", "Mul", "Div")},
        **{name: ([x], {}) for name in ("Relu", "LeakyRelu", "Tanh", "Sigmoid")},
    }
    assert set(cases) == set(OPERATORS)
    for name, (arrays, attributes) in cases.items():
        for kind in (np.float32, np.float16):
            given = [a.astype(kind) if a.dtype == np.float32 else a for a in arrays]
            names = [f"i{i}" for i in range(len(given))]
            infos = [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
                for n, a in zip(names, given, strict=True)
            ]
            node = helper.make_node(name, names, ["o"], **attributes)
            body = helper.make_graph([node], "g", infos, [helper.make_empty_tensor_value_info("o")])
            model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
            feeds = dict(zip(names, given, strict=True))
            wanted, found = ReferenceEvaluator(model).run(None, feeds)[0], StrictGraph(ir.from_proto(model)).run(feeds)["o"]
            assert found.dtype == wanted.dtype, name
            np.testing.assert_allclose(found, wanted, rtol=4e-3 if kind == np.float16 else 1e-5, atol=4e-3 if kind == np.float16 else 1e-6)


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("Conv", {"auto_pad": "SAME_UPPER"}),
        ("ConvTranspose", {"output_padding": [1, 1]}),
        ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ],
)
def test_convolutions_that_are_not_interpreted(name, attributes):
    x = torch.ones(1, 2, 4, 4)
    with pytest.raises(ExportError, match="cannot be run strictly"):
        OPERATORS[name](attributes, [x, torch.ones(2, 2, 2, 2)][: 1 if name == "AveragePool" else 2])


def test_an_operator_that_nobody_knows():
    model = graph([("Relu", ["x"], "y", {})], {})
    next(iter(model.graph)).op_type = "Wobble"
    with pytest.raises(ExportError, match="Wobble cannot be run strictly"):
        StrictGraph(model).run(X)
