import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import onnx
import onnxruntime
import pytest
from clapsep.engines import EngineError, EngineOptions, EngineUnavailable, Machine, engine_class, open_engine, this_machine
from clapsep.engines import onnxruntime as module
from clapsep.engines.machine import Gpu
from onnx import TensorProto, helper

ENGINE = engine_class("onnxruntime")
CUDA = EngineOptions(device="cuda")
GPU = (Gpu("H200", "9.0", 2**37),)
gpu_package = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def save(path: Path, nodes, inputs, outputs, weights=()) -> Path:
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, list(weights)), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, path)
    return path


def value(name: str, dtype: int = TensorProto.FLOAT, shape=("batch", 3)):
    return helper.make_tensor_value_info(name, dtype, list(shape))


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return save(tmp_path / "add.onnx", [helper.make_node("Add", ["a", "b"], ["sum"])], [value("a"), value("b")], [value("sum")])


@pytest.fixture
def bound(tmp_path: Path) -> module.BoundRunner:
    """The runner that CUDA uses, on the CPU's memory: x [batch, 3] and ids [batch] → double [batch, 3] and next [batch]."""
    nodes = [helper.make_node("Add", ["x", "x"], ["double"]), helper.make_node("Add", ["ids", "one"], ["next"])]
    ids = {"dtype": TensorProto.INT64, "shape": ("batch",)}
    one = helper.make_tensor("one", TensorProto.INT64, [], [1])
    path = save(tmp_path / "two.onnx", nodes, [value("x"), value("ids", **ids)], [value("double"), value("next", **ids)], [one])
    engine = ENGINE(path, EngineOptions(threads=1))
    return module.BoundRunner(onnxruntime, engine._session, "cpu", engine.inputs, engine.outputs)


def feed(seed: int, batch: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(batch, 3)).astype(np.float32), "ids": rng.integers(0, 99, batch)}


def check(result, inputs):
    np.testing.assert_array_equal(result["double"], 2 * inputs["x"])
    np.testing.assert_array_equal(result["next"], inputs["ids"] + 1)


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
    for key, text in (("location", "../secret"), ("offset", "0"), ("length", "12")):
        tensor.external_data.add(key=key, value=text)
    body = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [value("x")], [value("y")], [tensor])
    (inside / "g.onnx").write_bytes(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString())
    with pytest.raises(EngineError, match="cannot load"):
        open_engine("onnxruntime", inside / "g.onnx")


def test_an_unknown_device_is_refused(graph):
    with pytest.raises(EngineUnavailable, match="cpu or cuda, not on tpu") as caught:
        open_engine("onnxruntime", graph, EngineOptions(device="tpu"))
    assert caught.value.reason == "wrong-device"


@pytest.mark.skipif(this_machine().cuda is not None, reason="there is an NVIDIA driver here")
def test_cuda_without_a_driver_is_refused_before_the_graph_is_opened(tmp_path):
    with pytest.raises(EngineUnavailable, match="needs an NVIDIA GPU") as caught:
        open_engine("onnxruntime", tmp_path / "missing.onnx", CUDA)
    assert caught.value.reason == "no-driver"


@pytest.mark.parametrize(
    ("machine", "providers", "built", "reason", "message"),
    [
        (Machine("linux", "x86_64", None, "there is no NVIDIA driver"), [], "13.0", "no-driver", "there is no NVIDIA driver"),
        (Machine("linux", "x86_64", "13.0", "the NVIDIA driver sees no GPU"), [], "13.0", "no-gpu", "sees no GPU"),
        (
            Machine("linux", "x86_64", "13.0", "", GPU),
            ["CPUExecutionProvider"],
            "",
            "no-provider",
            "uninstall -y onnxruntime onnxruntime-gpu",
        ),
        (Machine("linux", "x86_64", "12.8", "", GPU), ["CUDAExecutionProvider"], "13.0", "driver-too-old", "CUDA 12.8 at most"),
    ],
)
def test_the_most_useful_reason_comes_first(monkeypatch, machine, providers, built, reason, message):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "cuda_version", built, raising=False)
    with pytest.raises(EngineUnavailable, match=message) as caught:
        ENGINE.preflight(CUDA, machine)
    assert caught.value.reason == reason


@pytest.mark.parametrize("driver", ["13.0", "14.1"])
def test_a_driver_of_the_wheels_cuda_version_or_later_will_do(monkeypatch, driver):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    ENGINE.preflight(CUDA, Machine("linux", "x86_64", driver, "", GPU))


@pytest.mark.skipif(gpu_package, reason="this onnxruntime has the CUDA provider")
def test_cuda_never_becomes_the_cpu_even_past_the_preflight(graph):
    with (
        pytest.warns(UserWarning, match="not in available"),
        pytest.raises(EngineUnavailable, match="libonnxruntime_providers_cuda.so: cannot open") as caught,
    ):
        ENGINE(graph, CUDA)
    assert caught.value.reason == "not-loadable"


def test_the_provider_that_runs_is_the_one_that_was_asked_for(graph, monkeypatch):
    """ONNX Runtime answers a provider that it lacks with a warning and the CPU."""
    monkeypatch.setitem(module.PROVIDERS, "cpu", "XnnpackExecutionProvider")
    with (
        pytest.warns(UserWarning, match="not in available"),
        pytest.raises(EngineUnavailable, match="on CPUExecutionProvider, not on Xnnpack") as caught,
    ):
        ENGINE(graph, EngineOptions())
    assert caught.value.reason == "no-provider"


@pytest.mark.parametrize(("threads", "started"), [(1, 0), (4, 3)])
def test_threads_are_honoured(graph, threads, started):
    before = len(os.listdir("/proc/self/task"))
    engine = ENGINE(graph, EngineOptions(threads=threads))
    assert len(os.listdir("/proc/self/task")) - before == started  # the caller is one of them
    del engine


def test_bound_results_outlive_later_runs_and_batches(bound):
    inputs = [feed(1), feed(2), feed(3, batch=4), feed(4)]
    results = [bound.run(given) for given in inputs]
    for result, given in zip(results, inputs, strict=True):
        check(result, given)


def test_bound_buffers_are_kept_for_their_batch_size(bound):
    for batch in (1, 4, 1, 4, 1):
        bound.run(feed(0, batch))
    assert sorted(buffers.axes["batch"] for buffers in bound._idle) == [1, 4]
    for batch in range(1, 20):
        bound.run(feed(0, batch))
    assert [buffers.axes["batch"] for buffers in bound._idle] == list(range(20 - module.IDLE_BUFFERS, 20))


def test_bound_inputs_may_have_strides(bound):
    wide = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    given = {"x": wide[:, ::2].T, "ids": np.arange(8)[::2]}
    check(bound.run(given), given)


def test_bound_callers_do_not_meet(bound):
    together = Barrier(4)

    def call(seed: int) -> None:
        together.wait()
        for turn in range(200):
            given = feed(seed * 1000 + turn, batch=1 + turn % 2)
            check(bound.run(given), given)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))


def test_bound_buffers_of_a_failed_run_are_not_used_again(bound):
    with pytest.raises(RuntimeError, match="size"):
        bound.run({"x": np.zeros((5, 3), np.float32), "ids": np.zeros(2, np.int64)})
    assert not bound._idle
