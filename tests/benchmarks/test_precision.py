"""The comparison of float16 conversions, on graphs small enough to see that it sees."""

import math

import numpy as np
import onnx_ir as ir
import precision
import pytest
import torch
from clapsep.export.precision import convert
from clapsep.export.strict import OPERATORS
from precision_tables import graph_table, shown
from strict_runs import Subject, min_db, rounded_inside, score


@pytest.fixture(scope="module")
def subject(demo_bundle):
    return Subject(demo_bundle)


def broken(subject, graph, out):
    """A conversion after which one product overflows float16."""
    model = ir.load(subject.bundle.graph(graph))
    convert(model, ())
    weight = next(node for node in model.graph if node.op_type == "Gemm").inputs[1]
    weight.const_value = ir.tensor(np.where(np.random.default_rng(1).random(weight.shape.numpy()) < 0.5, -6e4, 6e4).astype(np.float16))
    ir.save(model, out, external_data=f"{out.name}.data")
    return {}


def test_ours_beats_naive_and_overflow_is_seen(subject):
    makers = {"float32": precision.copy_of, "ours": precision.ours, "naive": precision.naive, "broken": broken}
    rows = {name: precision.measure(subject, "text_encoder", make, plans=False) for name, make in makers.items()}
    strict = {name: row["strict"] for name, row in rows.items()}
    assert strict["float32"]["output_db"] > 120
    assert strict["float32"]["half_nodes"] == 0
    assert strict["naive"]["float32_nodes"] == 0 < strict["ours"]["float32_nodes"] < strict["ours"]["half_nodes"]
    assert 46 <= strict["naive"]["output_db"] < strict["ours"]["output_db"] < 80
    assert rows["ours"]["ort"]["output_db"] > strict["ours"]["output_db"]  # it computes in float32 inside
    assert strict["ours"]["not_finite"] == 0 < strict["broken"]["not_finite"]
    assert not strict["broken"]["output_db"] > 20
    assert rows["ours"]["reference"]["MatMul"]["ulp"] <= 2
    assert rows["ours"]["pessimistic"]["LayerNormalization"]["strict"]["output_db"] < strict["ours"]["output_db"]
    table = graph_table(rows, waves=False)
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_converter_that_is_not_there_has_no_numbers(subject, tmp_path):
    row = precision.measure(subject, "text_encoder", precision.ways(None)["modelopt.onnx.autocast"])
    assert row == {"failed": "not installed"}
    with pytest.raises(precision.Failed, match="not installed"):
        precision.work("python3", "modelopt.onnx.autocast", tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert "not installed" in graph_table({"x": row}, waves=True)


def test_another_converter_goes_through_its_process(subject):
    row = precision.measure(subject, "text_encoder", precision.ways(None)["onnxruntime.transformers.float16"], plans=False)
    assert row["strict"]["float32_nodes"] < 5
    assert 46 < row["strict"]["output_db"] < 80


def test_not_a_number_is_worse_than_any(subject):
    nothing = lambda feeds: {"embedding": np.full((len(feeds["input_ids"]), 128), np.nan, np.float32)}  # noqa: E731
    row = score(subject, "text_encoder", nothing)
    assert math.isnan(row["output_db"])
    assert math.isnan(min_db([50.0, math.nan]))
    assert math.isnan(min_db([math.nan, 50.0]))
    assert shown(row, "output_db") == "not finite"
    assert precision.plain(row)["output_db"] is None


def test_rounding_inside_is_at_every_step_and_is_undone():
    before, ones = dict(OPERATORS), torch.ones((1, 4096), dtype=torch.float16)
    with rounded_inside("Softmax"):
        assert float(OPERATORS["Softmax"]({"axis": -1}, [ones])[0, 0]) == 1 / 2048  # where adding 1 stops having an effect
        assert float(OPERATORS["Softmax"]({"axis": -1}, [ones.float()])[0, 0]) == pytest.approx(1 / 4096)
    with rounded_inside("LayerNormalization") as lost:
        steps = torch.tensor([[-20.0, 20.0] * 200, [-1.0, 1.0] * 200], dtype=torch.float16)
        found = OPERATORS["LayerNormalization"]({"axis": -1}, [steps, ones[0, :400]])
    assert not found[0].any()  # the sum of squares overflowed and nothing outside shows it
    assert found[1].abs() == pytest.approx(1, rel=1e-2)
    assert lost == {"sums not finite": 1, "nodes": 1}
    assert before == OPERATORS
