import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import onnx
import openvino as ov
import pytest
from clapsep.engines import EngineError, EngineOptions, EngineUnavailable, PlanSettings, Target, engine_class, open_engine, this_machine
from clapsep.engines import openvino as module
from onnx import TensorProto, helper, numpy_helper

ENGINE = engine_class("openvino")
WEIGHTS = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
FLOAT32 = 5e-6  # largest error of 64 products in float32; bfloat16 is off by 1e-4 and more
FP32, BF16 = PlanSettings("fp32", 4), PlanSettings("bf16", 4)
bf16 = pytest.mark.skipif("BF16" not in module.capabilities(), reason="this processor has no bfloat16")


def save(path: Path, dtype=np.float32) -> Path:
    """x [batch, 64] and ids [batch] → product [batch, 64] and next [batch]; the weights are `dtype`, inputs and outputs are not."""
    onnx_dtype = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Cast", ["x"], ["cast"], to=onnx_dtype),
        helper.make_node("MatMul", ["cast", "w"], ["y"]),
        helper.make_node("Cast", ["y"], ["product"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["ids", "one"], ["next"]),
    ]
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["batch", 64]), value("ids", TensorProto.INT64, ["batch"])],
        [value("product", TensorProto.FLOAT, ["batch", 64]), value("next", TensorProto.INT64, ["batch"])],
        [numpy_helper.from_array(WEIGHTS.astype(dtype), "w"), helper.make_tensor("one", TensorProto.INT64, [], [1])],
    )
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return save(tmp_path / "g.onnx")


@pytest.fixture
def plan(graph: Path) -> Path:
    ENGINE.compile(graph, graph.with_suffix(".blob"), FP32, lambda _: None)
    return graph.with_suffix(".blob")


def feed(seed: int, batch: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(batch, 64)).astype(np.float32), "ids": rng.integers(0, 99, batch)}


def error(result, inputs) -> float:
    """Largest error of the product, in units of its own scale."""
    np.testing.assert_array_equal(result["next"], inputs["ids"] + 1)
    return float(np.abs(result["product"] - inputs["x"].astype(np.float64) @ WEIGHTS).max() / 8)


def is_plan(path: Path) -> Path:
    return path.with_suffix(".blob")


@pytest.mark.parametrize("opened", [lambda graph: graph, is_plan])
def test_graph_and_plan_compute_float32_for_any_batch(graph, plan, opened):
    engine = open_engine("openvino", opened(graph), EngineOptions(threads=1))
    assert engine.provider == "CPU f32"
    assert [(s.name, s.dtype, s.shape) for s in engine.inputs] == [("x", "float32", ("batch", 64)), ("ids", "int64", ("batch",))]
    assert [s.name for s in engine.outputs] == ["product", "next"]
    for batch in (1, 4, 1):
        given = feed(batch, batch)
        assert error(engine.run(given), given) < FLOAT32


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_float32_is_the_default_even_for_float16_graphs(tmp_path, dtype):
    """OpenVINO's own default is bfloat16 wherever the processor has it, which is off by 1e-3 and more."""
    engine = open_engine("openvino", save(tmp_path / "g.onnx", dtype))
    assert engine._compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
    given = {"x": np.ones((1, 64), np.float32), "ids": np.zeros(1, np.int64)}
    wanted = WEIGHTS.astype(dtype).astype(np.float64).sum(0)
    assert np.abs(engine.run(given)["product"] - wanted).max() < (1e-5 if dtype is np.float32 else 2e-2)


@bf16
def test_bfloat16_only_where_it_is_asked_for(graph):
    given = feed(0, 4)
    engine = open_engine("openvino", graph, EngineOptions(precision="bf16"))
    assert engine.provider == "CPU bf16"
    assert 1e-4 < error(engine.run(given), given) < 3e-2


@bf16
def test_a_plan_keeps_its_precision_and_takes_no_other(graph):
    path = graph.with_suffix(".blob")
    ENGINE.compile(graph, path, BF16, lambda _: None)
    assert open_engine("openvino", path, EngineOptions(precision="bf16")).provider == "CPU bf16"
    with pytest.raises(EngineUnavailable, match="computes in bf16, not in f32"):
        open_engine("openvino", path)
    ENGINE.compile(graph, path, FP32, lambda _: None)
    with pytest.raises(EngineUnavailable, match="computes in f32, not in bf16") as caught:
        open_engine("openvino", path, EngineOptions(precision="bf16"))
    assert caught.value.reason == "wrong-precision"


@bf16
def test_the_precision_that_runs_is_the_one_that_was_asked_for(graph, monkeypatch):
    """Asked for f16, OpenVINO takes bfloat16 without a word."""
    monkeypatch.setitem(module.HINTS, "bf16", "f16")
    with pytest.raises(EngineUnavailable, match="in bf16 on CPU, not in f16") as caught:
        open_engine("openvino", graph, EngineOptions(precision="bf16"))
    assert caught.value.reason == "wrong-precision"


def test_another_device_is_refused():
    properties = {"INFERENCE_PRECISION_HINT": ov.Type.f32, "EXECUTION_DEVICES": ["GPU.0"]}
    with pytest.raises(EngineUnavailable, match="in f32 on GPU.0, not in f32 on the CPU"):
        module._require_observed(SimpleNamespace(get_property=properties.get), "f32", Path("g.onnx"))


def test_a_processor_without_bfloat16_is_refused(graph, monkeypatch):
    monkeypatch.setattr(module, "capabilities", lambda: ("FP32",))
    with pytest.raises(EngineUnavailable, match="does not compute in bf16") as caught:
        open_engine("openvino", graph, EngineOptions(precision="bf16"))
    assert caught.value.reason == "wrong-precision"


@pytest.mark.parametrize(("options", "reason"), [({"precision": "fp8"}, "wrong-precision"), ({"device": "cuda"}, "wrong-device")])
def test_what_it_cannot_do_is_refused(graph, options, reason):
    with pytest.raises(EngineUnavailable) as caught:
        open_engine("openvino", graph, EngineOptions(**options))
    assert caught.value.reason == reason


def test_results_outlive_later_runs(graph):
    """OpenVINO writes each result of a request over the one before."""
    engine = open_engine("openvino", graph)
    inputs = [feed(1), feed(2), feed(3, 4)]
    results = [engine.run(given) for given in inputs]
    assert max(map(error, results, inputs)) < FLOAT32
    assert len(engine._idle) == 1


def test_strided_and_read_only_inputs_are_taken_and_left_alone(graph):
    wide = np.random.default_rng(0).normal(size=(128, 3)).astype(np.float32)
    wide.setflags(write=False)
    given, before = {"x": wide[::2].T, "ids": np.arange(6)[::2]}, wide.copy()
    assert error(open_engine("openvino", graph).run(given), given) < FLOAT32
    np.testing.assert_array_equal(wide, before)


def test_callers_do_not_meet(graph):
    engine, together = open_engine("openvino", graph, EngineOptions(threads=1)), Barrier(4)

    def call(seed: int) -> None:
        together.wait()
        for turn in range(100):
            given = feed(seed * 1000 + turn, batch=1 + turn % 2)
            assert error(engine.run(given), given) < FLOAT32

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert 1 <= len(engine._idle) <= 4


def test_threads_are_honoured_and_no_processor_is_claimed(graph):
    engine = open_engine("openvino", graph, EngineOptions(threads=1))
    assert engine._compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert engine._compiled.get_property("ENABLE_CPU_PINNING") is False
    assert engine._compiled.get_property("NUM_STREAMS") == 1


def test_openvino_does_not_phone_home():
    code = (
        "import threading\n"
        "from clapsep.engines.openvino import OpenVinoEngine as E\n"
        "E.load_library()\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "print(telemetry_utils.tm.__name__, [t.name for t in threading.enumerate()])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "openvino.tools.ovc.telemetry_stub ['MainThread']"


def test_the_version_is_short():
    assert ENGINE.version() == ov.__version__.split("-")[0] == ".".join(ENGINE.version().split(".")[:3])


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_truncated_graph_is_an_engine_error(graph, keep):
    graph.write_bytes(graph.read_bytes()[:keep])
    with pytest.raises(EngineError, match="cannot load"):
        open_engine("openvino", graph)


def test_weights_outside_the_bundle_are_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(12))
    inside = tmp_path / "graphs"
    inside.mkdir()
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", "../secret"), ("offset", "0"), ("length", "12")):
        tensor.external_data.add(key=key, value=text)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    body = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    (inside / "g.onnx").write_bytes(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString())
    with pytest.raises(EngineError, match="outside the base directory"):
        open_engine("openvino", inside / "g.onnx")


def test_a_plan_says_what_it_runs_on(graph):
    said: list[str] = []
    target = ENGINE.compile(graph, graph.with_suffix(".blob"), FP32, said.append)
    machine = this_machine()
    assert target == Target(ENGINE.version(), machine.os, machine.architecture, cpu=module.capabilities())
    assert "FP32" in target.cpu
    assert list(target.cpu) == sorted(target.cpu)
    assert said
    ENGINE.check_plan(target, machine)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cpu": ("AMX", "FP32")}, "other-cpu"),
        ({"version": "2025.0.0"}, "other-version"),
        ({"architecture": "aarch64"}, "other-system"),
    ],
)
def test_a_plan_for_another_machine_is_refused_before_it_is_opened(change, reason):
    machine = this_machine()
    target = replace(Target(ENGINE.version(), machine.os, machine.architecture, cpu=module.capabilities()), **change)
    with pytest.raises(EngineUnavailable) as caught:
        ENGINE.check_plan(target, machine)
    assert caught.value.reason == reason


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the variable is for x86-64")
def test_a_processor_with_fewer_instructions_is_another(plan):
    """oneDNN pretends to be an older processor: both the target and OpenVINO itself then refuse the plan."""
    target = module.capabilities()
    code = f"""
from pathlib import Path
from clapsep.engines import EngineError, Target, engine_class, open_engine, this_machine
engine, machine = engine_class("openvino"), this_machine()
try:
    engine.check_plan(Target(engine.version(), machine.os, machine.architecture, cpu={target!r}), machine)
except EngineError as error:
    print(error.reason, error)
try:
    open_engine("openvino", Path({str(plan)!r}))
except EngineError as error:
    print(error)
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "SSE41"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    refused, failed = done.stdout.splitlines()
    assert refused.startswith("other-cpu the plan was compiled for a processor with")
    assert "cannot load the plan" in failed
    assert "compile it again" in failed


def test_a_plan_appears_whole_or_not_at_all(graph, tmp_path):
    folder = tmp_path / "plans"
    with pytest.raises(EngineError, match="cannot be written"):
        ENGINE.compile(graph, folder / "g.blob", FP32, lambda _: None)
    folder.mkdir()
    (folder / "g.blob").mkdir()  # cannot be replaced by a file
    with pytest.raises(EngineError, match="cannot be written"):
        ENGINE.compile(graph, folder / "g.blob", FP32, lambda _: None)
    assert os.listdir(folder) == ["g.blob"]


def test_a_graph_that_does_not_compile_leaves_no_plan(graph):
    graph.write_bytes(b"no graph")
    with pytest.raises(EngineError, match="cannot load"):
        ENGINE.compile(graph, graph.with_suffix(".blob"), FP32, lambda _: None)
    assert os.listdir(graph.parent) == ["g.onnx"]


DAMAGE = """
import random, sys
from pathlib import Path
from clapsep.engines import EngineError, open_engine
good, bad = Path(sys.argv[1]).read_bytes(), Path(sys.argv[1]).with_name("bad.blob")
body = good.index(b"\\n") + 1
random.seed(0)
damaged = [good[:n] for n in (0, 1, 20, body - 1, body, body + 8, len(good) - 1, *random.sample(range(len(good)), 20))]
for place in [*range(0, body, 7), *random.sample(range(body, len(good)), 60)]:
    damaged.append(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1:])
damaged += [random.randbytes(n) for n in (1, 100, 5000)] + [good + b"x", good[body:], b"{}\\n" + good[body:], b"[]\\n", b"null\\n"]
for content in damaged:
    bad.write_bytes(content)
    try:
        open_engine("openvino", bad)
    except EngineError as error:
        print("refused")
    else:
        print("accepted")
"""


def test_every_damaged_plan_is_refused_and_none_ends_the_process(plan):
    done = subprocess.run([sys.executable, "-c", DAMAGE, str(plan)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 100
    assert set(done.stdout.splitlines()) == {"refused"}


def test_what_openvino_refuses_in_an_intact_plan_is_one_sentence(plan):
    """As from another release of OpenVINO, whose files this one does not read."""
    module._write_plan(plan, "f32", b"something else")
    with pytest.raises(EngineError, match=r"^openvino .* cannot load the plan .*; compile it again$"):
        open_engine("openvino", plan)


def test_a_missing_plan_is_an_engine_error(tmp_path):
    with pytest.raises(EngineError, match="cannot be read as a plan"):
        open_engine("openvino", tmp_path / "none.blob")


def test_the_first_line_of_a_plan_is_readable(plan):
    header, _, rest = plan.read_bytes().partition(b"\n")
    assert json.loads(header) | {"sha256": ""} == {"format": "clapsep-openvino-plan", "precision": "f32", "size": len(rest), "sha256": ""}
    assert list(plan.parent.glob(".*")) == []
