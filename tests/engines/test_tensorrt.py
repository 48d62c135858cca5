"""TensorRT: compilation with the real TensorRT-RTX compiler, which needs no GPU; execution on a *simulated* GPU (tensorrt_simulated.py).

What only a GPU can show, that a real plan runs and is right, is in `test_a_real_plan_on_a_real_gpu`, which is skipped without one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from clapsep.engines import EngineError, EngineOptions, EngineUnavailable, Machine, PlanSettings, Target, open_engine, this_machine
from clapsep.engines import cuda as cuda_module
from clapsep.engines import tensorrt as kinds
from clapsep.engines.child import Child, make_file
from clapsep.engines.machine import Gpu
from clapsep.engines.tensorrt import TensorRtEngine, TensorRtRtxEngine, cuda_major
from clapsep.engines.tensorrt_builder import build
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parent))
from tensorrt_simulated import SimulatedContext, SimulatedCuda, SimulatedEngine, SimulatedRtxRuntime, simulated_plan, simulated_tensorrt

pytest.importorskip("tensorrt_rtx")
SETTINGS = PlanSettings("fp32", max_batch=4, compute_capabilities=("8.6",))
NO_GPU = Machine("linux", "x86_64", trouble="there is no NVIDIA driver")
RTX_3090 = Machine("linux", "x86_64", "13.0", gpus=(Gpu("RTX 3090", "8.6", 2**34),))
H200 = Machine("linux", "x86_64", "13.0", gpus=(Gpu("H200", "9.0", 2**37),))
ADA = Machine("linux", "x86_64", "12.4", gpus=(Gpu("RTX 4090", "8.9", 2**34),))
TARGET = Target("1.7.1.116", "linux", "x86_64", "13.0", ("8.6",))


def quiet(text):
    pass


def make_graph(path, nodes, shape=("batch", 4, 8), out=("batch", 4, 8), **constants):
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims)) for name, dims in (("x", shape), ("y", out))]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


WEIGHT = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)


@pytest.fixture
def graph(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("Add", ["r", "x"], ["y"]),
    ]
    return make_graph(tmp_path / "float.onnx", nodes, w=WEIGHT)


@pytest.fixture
def half_graph(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "w"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
    ]
    return make_graph(tmp_path / "half.onnx", nodes, w=WEIGHT.astype(np.float16))


# Compiling, for real.


def test_compiles_for_named_gpus_without_one(graph, tmp_path):
    said = []
    settings = replace(SETTINGS, compute_capabilities=("8.9", "8.6"))
    report = build("tensorrt-rtx", graph, tmp_path / "a.plan", settings, said.append)
    assert report.target == Target("1.7.1.116", this_machine().os, this_machine().architecture, "13.0", ("8.6", "8.9"))
    assert report.size == (tmp_path / "a.plan").stat().st_size > 10_000
    assert report.layers >= 4
    assert report.half_share == 0
    assert 50e6 < report.memory < 2e9
    assert report.seconds > 0
    assert "building engine" in said
    assert len(said) < 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.plan", "float.onnx"]


def test_the_same_build_gives_the_same_bytes(graph, tmp_path):
    plans = [tmp_path / name for name in ("a.plan", "b.plan", "other.plan")]
    for plan, batch in zip(plans, (4, 4, 3), strict=True):
        TensorRtRtxEngine.compile(graph, plan, replace(SETTINGS, max_batch=batch), quiet)
    assert plans[0].read_bytes() == plans[1].read_bytes() != plans[2].read_bytes()


def test_half_precision_is_counted(half_graph, tmp_path):
    report = build("tensorrt-rtx", half_graph, tmp_path / "a.plan", replace(SETTINGS, precision="fp16"), quiet)
    assert 0.5 < report.half_share < 1
    with pytest.raises(EngineError, match="half precision, not in fp32"):
        build("tensorrt-rtx", half_graph, tmp_path / "b.plan", SETTINGS, quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute_capabilities": ("8.6", "9.0")}, "capability '9.0'; choose from: 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"),
        ({"compute_capabilities": ("abc",)}, "capability 'abc'; choose from"),
        ({"workspace": 1000}, "allow a larger workspace"),
        ({"memory": 150_000_000}, "more than the 150,000,000 bytes"),
        ({"memory": 1}, "more than the 1 bytes"),
        ({"compatibility": "ampere-plus"}, "has no --compatibility"),
        ({"version_compatible": True}, "has no --version-compatible"),
    ],
)
def test_what_cannot_be_compiled_leaves_the_old_plan(graph, tmp_path, change, message):
    plan = tmp_path / "a.plan"
    plan.write_bytes(b"old")
    with pytest.raises(EngineError, match=message):
        TensorRtRtxEngine.compile(graph, plan, replace(SETTINGS, **change), quiet)
    assert plan.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.plan", "float.onnx"]


def test_unsupported_nodes_are_all_named(tmp_path):
    nodes = [
        helper.make_node("DFT", ["x", "", "axis"], ["d"], name="spectrum"),
        helper.make_node("Abs", ["d"], ["a"]),
        helper.make_node("DFT", ["a", "", "axis"], ["y"], name="cepstrum"),
    ]
    path = make_graph(tmp_path / "dft.onnx", nodes, ("batch", 64, 1), ("batch", 64, 2), axis=np.array(1))
    with pytest.raises(EngineError, match=r"does not support DFT \(node 'spectrum'\), DFT \(node 'cepstrum'\); use another engine"):
        TensorRtRtxEngine.compile(path, tmp_path / "a.plan", SETTINGS, quiet)


CONFIGURED = """
import sys
import tensorrt_rtx as trt
from clapsep.engines import tensorrt_builder as builder
request = builder.Request("tensorrt_rtx", sys.argv[1], "fp32", 5, ("8.6", "8.9"), "none", False, 2**20, None)
made, network, parser = builder._parse(trt, request, [])
config = builder._config(trt, made, network, request, builder._monitor(trt, print))
print([flag for flag in ("TF32", "REQUIRE_USER_ALLOCATION") if config.get_flag(getattr(trt.BuilderFlag, flag))])
print(config.num_compute_capabilities, config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE))
print(builder._profile(network, request))
request = builder.Request("tensorrt", sys.argv[1], "fp32", 5, (), "ampere-plus", True, None, sys.argv[1] + ".no-cache-yet")
config = builder._config(trt, made, network, request, builder._monitor(trt, print))
print([flag for flag in ("TF32", "VERSION_COMPATIBLE") if config.get_flag(getattr(trt.BuilderFlag, flag))])
"""


def test_what_the_compiler_is_told(graph):
    """No TF32, so that fp32 means fp32; nothing allocated while it runs, so that it can be captured; best at full batches.

    The last line is what TensorRT is told, with TensorRT-RTX in its place.
    """
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run([sys.executable, "-c", CONFIGURED, graph], env=environment, capture_output=True, text=True, check=True)
    told = [line for line in done.stdout.splitlines() if not line.startswith(("[I]", "[W]", " ", "]"))]
    assert told == [
        "['REQUIRE_USER_ALLOCATION']",
        "2 1048576",
        "{x [min=(1, 4, 8), opt=(5, 4, 8), max=(5, 4, 8)]}",
        "['VERSION_COMPATIBLE']",
    ]


@pytest.mark.parametrize(("shape", "message"), [((2, 4, 8), "only its first axis"), (("batch", "time", 8), "only its first axis")])
def test_only_the_batch_may_vary(tmp_path, shape, message):
    path = make_graph(tmp_path / "g.onnx", [helper.make_node("Relu", ["x"], ["y"])], shape, shape)
    with pytest.raises(EngineError, match=message):
        TensorRtRtxEngine.compile(path, tmp_path / "a.plan", SETTINGS, quiet)


def test_files_that_are_no_graphs(graph, tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"junk" * 10)
    with pytest.raises(EngineError, match="Failed to parse the ONNX model"):
        TensorRtRtxEngine.compile(tmp_path / "junk.onnx", tmp_path / "a.plan", SETTINGS, quiet)
    with pytest.raises(EngineError, match="there is no graph"):
        TensorRtRtxEngine.compile(tmp_path / "none.onnx", tmp_path / "a.plan", SETTINGS, quiet)
    with pytest.raises(EngineError, match="make it, or choose another place"):
        TensorRtRtxEngine.compile(graph, tmp_path / "none" / "a.plan", SETTINGS, quiet)


def test_a_full_disk_is_an_error(graph, small_disk):
    disk = small_disk(64)
    with pytest.raises(EngineError, match=r"a\.plan cannot be read or written \(No space left on device\)"):
        TensorRtRtxEngine.compile(graph, disk / "a.plan", SETTINGS, quiet)
    assert not list(disk.iterdir())


def test_the_tensorrt_library_is_not_installed_here(graph, tmp_path):
    with pytest.raises(EngineUnavailable, match=r"clapsep-export\[tensorrt\]") as caught:
        TensorRtEngine.compile(graph, tmp_path / "a.plan", SETTINGS, quiet)
    assert caught.value.reason == "not-installed"


# The child process.

STUBBORN = """
import os, time
from clapsep.engines.child import serve
def work(fields, progress, write):
    progress(f"pid {os.getpid()}")
    write(b"half of it")
    progress("written")
    how = fields["how"]
    if how == "sleep": time.sleep(600)
    if how == "hold": sum(range(10**12))  # in one piece: no other thread of Python runs meanwhile
    if how == "grow": kept = bytearray(10**8); time.sleep(600)
    if how == "abort": os.abort()
    time.sleep(0.2)
    return {"size": 10}
serve(work)
"""
PARENT = """
import sys
from pathlib import Path
from clapsep.engines.child import Child, make_file
make_file(Path(sys.argv[1]), Child("stubborn", {}), {"how": "sleep"}, lambda text: print(text, flush=True))
"""


@pytest.fixture
def stubborn(tmp_path, monkeypatch):
    """A child module that writes part of its file and sleeps; no compiler is as slow as that when a test needs it."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    out = tmp_path / "out"
    out.mkdir()
    return out / "a.plan"


def gone(pid, seconds=5.0):
    """Whether the process ends in time; a zombie has ended."""
    for _ in range(int(seconds * 50)):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_parent_leaves_no_child_and_no_file(stubborn, how):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(stubborn)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline().split()[1])
    assert parent.stdout.readline() == "written\n"
    assert list(stubborn.parent.iterdir())  # the unfinished file, under another name
    parent.send_signal(how)
    parent.communicate()
    assert gone(child)
    assert not list(stubborn.parent.iterdir())


def have_made(out, how, told=quiet, memory=None):
    """Have the stubborn child make `out`; returns its report and leaves its process id in `have_made.pid`."""

    def progress(text):
        if text.startswith("pid"):
            have_made.pid = int(text.split()[1])
        told(text)

    return make_file(out, Child("stubborn", {}, memory), {"how": how}, progress)


def test_a_killed_compiler_says_that_it_looks_like_memory(stubborn):
    with pytest.raises(EngineError, match="ended by signal 9, which is what running out of memory looks like"):
        have_made(stubborn, "sleep", lambda _: os.kill(have_made.pid, signal.SIGKILL))
    assert not list(stubborn.parent.iterdir())


def test_a_compiler_that_takes_too_much_is_ended(stubborn):
    with pytest.raises(EngineError, match="more than the 90,000,000 bytes of memory"):
        have_made(stubborn, "grow", memory=90_000_000)
    assert gone(have_made.pid)
    assert not list(stubborn.parent.iterdir())
    assert have_made(stubborn, "", memory=90_000_000) == {"size": 10}


def test_a_compiler_that_cannot_be_interrupted_is_ended(stubborn):
    def stop(text):
        if text == "written":
            time.sleep(0.5)  # until it is in the middle of it
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        have_made(stubborn, "hold", stop)
    assert gone(have_made.pid, 0.1)
    assert not list(stubborn.parent.iterdir())


def test_crashes_are_errors_with_the_last_words(stubborn):
    with pytest.raises(EngineError, match="ended by signal 6"):
        have_made(stubborn, "abort")
    with pytest.raises(EngineError, match="exit code 1 .*KeyError: 'how'"):
        make_file(stubborn, Child("stubborn", {}), {}, quiet)
    with pytest.raises(EngineError, match="exit code 1 .*No module named nonesuch"):
        make_file(stubborn, Child("nonesuch", {}), {}, quiet)
    assert not list(stubborn.parent.iterdir())


def test_the_caller_decides_what_an_interrupt_means(stubborn):
    """Ctrl-C reaches the child too; one whose parent goes on goes on."""
    assert have_made(stubborn, "", lambda text: os.kill(have_made.pid, signal.SIGINT) if text == "written" else None) == {"size": 10}
    assert [path.name for path in stubborn.parent.iterdir()] == ["a.plan"]


def test_a_compilation_that_is_killed_leaves_nothing(graph, tmp_path):
    """The real compiler, ended in the middle by its caller."""

    def stop(text):
        if text == "building engine":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TensorRtRtxEngine.compile(graph, tmp_path / "a.plan", SETTINGS, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["float.onnx"]


# Whether it can run, and where a plan runs.


@pytest.mark.skipif(bool(this_machine().gpus), reason="for machines without a GPU")
def test_without_a_driver_nothing_crashes(tmp_path):
    """In processes of their own: some TensorRT runtimes end the process where there is no driver."""
    (tmp_path / "a.plan").write_bytes(b"ptrt" + bytes(200))
    code = "from pathlib import Path; from clapsep.engines import *; from clapsep.engines.tensorrt import TensorRtRtxEngine as E; "
    for call in ("E(Path('a.plan'), EngineOptions())", "open_engine('tensorrt-rtx', Path('a.plan'))"):
        done = subprocess.run([sys.executable, "-c", code + call], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "EngineUnavailable: engine tensorrt-rtx needs an NVIDIA GPU and there is no NVIDIA driver" in done.stderr


def test_compiling_for_this_machine_needs_a_gpu_or_a_name():
    settings = replace(SETTINGS, compute_capabilities=())
    with pytest.raises(EngineUnavailable, match="--compute-capability") as caught:
        TensorRtRtxEngine.target(settings, NO_GPU)
    assert caught.value.reason == "no-driver"
    with pytest.raises(EngineUnavailable, match="--compute-capability") as caught:
        TensorRtRtxEngine.target(settings, replace(RTX_3090, gpus=(), trouble="the NVIDIA driver sees no GPU"))
    assert caught.value.reason == "no-gpu"
    assert TensorRtRtxEngine.target(settings, RTX_3090).compute_capabilities == ("8.6",)


def test_tensorrt_compiles_for_the_gpu_that_is_there(monkeypatch):
    """With TensorRT-RTX in the place of TensorRT, which is not installed here."""
    monkeypatch.setattr(TensorRtEngine, "library", "tensorrt_rtx")
    settings = replace(SETTINGS, compute_capabilities=(), compatibility="ampere-plus", version_compatible=True)
    target = TensorRtEngine.target(settings, H200)
    assert (target.compute_capabilities, target.compatibility, target.version_compatible) == (("9.0",), "ampere-plus", True)
    assert TensorRtEngine.target(replace(settings, compute_capabilities=("9.0",)), H200) == target
    with pytest.raises(EngineError, match=r"only for the GPU in the machine, here SM 9\.0, not for SM 8\.6"):
        TensorRtEngine.target(replace(settings, compute_capabilities=("8.6",)), H200)
    with pytest.raises(EngineUnavailable) as caught:
        TensorRtEngine.target(settings, NO_GPU)
    assert caught.value.reason == "no-driver"


def test_the_library_says_what_cuda_it_needs():
    assert cuda_major("tensorrt_rtx") == 13
    assert cuda_major("nonesuch") is None
    with pytest.raises(EngineUnavailable, match=r"built for CUDA 13 and the NVIDIA driver supports 12\.4") as caught:
        TensorRtRtxEngine.preflight(EngineOptions(), ADA)
    assert caught.value.reason == "driver-too-old"
    TensorRtRtxEngine.preflight(EngineOptions(), RTX_3090)
    for machine, reason in ((NO_GPU, "no-driver"), (replace(NO_GPU, cuda="13.0"), "no-gpu")):
        with pytest.raises(EngineUnavailable) as caught:
            TensorRtRtxEngine.preflight(EngineOptions(), machine)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("target", "machine", "reason", "message"),
    [
        (
            replace(TARGET, compute_capabilities=("8.9", "12.0")),
            RTX_3090,
            "other-gpu",
            "SM 8.9 and 12.0 and this GPU, RTX 3090, has SM 8.6",
        ),
        (TARGET, H200, "other-gpu", "SM 8.6 and this GPU, H200, has SM 9.0"),
        (replace(TARGET, compatibility="same-compute-capability"), H200, "other-gpu", "SM 8.6 and this GPU"),
        (replace(TARGET, compatibility="ampere-plus"), replace(H200, gpus=(Gpu("T4", "7.5", 1),)), "other-gpu", "8.0 and newer"),
        (replace(TARGET, version="1.6.0.1"), RTX_3090, "other-version", "by tensorrt-rtx 1.6.0.1 and this is 1.7.1.116"),
        (replace(TARGET, version="1.8.0.1", version_compatible=True), RTX_3090, "other-version", "1.8.0.1"),
        (replace(TARGET, os="windows"), RTX_3090, "other-system", "windows"),
        (replace(TARGET, architecture="aarch64"), RTX_3090, "other-system", "aarch64"),
        (replace(TARGET, compute_capabilities=()), ADA, "driver-too-old", r"needs CUDA 13.0 and the NVIDIA driver supports 12\.4"),
        (TARGET, replace(RTX_3090, gpus=()), "other-gpu", "this machine has no GPU"),
    ],
)
def test_plans_for_other_machines_are_refused(target, machine, reason, message):
    with pytest.raises(EngineUnavailable, match=message) as caught:
        TensorRtRtxEngine.check_plan(target, machine)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("target", "machine"),
    [
        (TARGET, RTX_3090),
        (replace(TARGET, compatibility="same-compute-capability"), RTX_3090),
        (replace(TARGET, compatibility="ampere-plus"), H200),
        (replace(TARGET, compute_capabilities=("8.6", "9.0")), H200),
        (replace(TARGET, compute_capabilities=()), H200),
        (replace(TARGET, version="1.6.0.1", version_compatible=True), RTX_3090),
    ],
)
def test_plans_for_this_machine_are_taken(target, machine):
    TensorRtRtxEngine.check_plan(target, machine)


# Running, on the simulated GPU.


@pytest.fixture
def gpu(monkeypatch):
    """The simulated CUDA; engines of this test see it, its TensorRT, and a machine that has it."""
    cuda = SimulatedCuda()
    trt = simulated_tensorrt(cuda)
    cuda.trt = trt
    monkeypatch.setattr(cuda_module, "load_api", lambda: cuda)
    monkeypatch.setattr(kinds, "this_machine", lambda: RTX_3090)
    monkeypatch.setattr(TensorRtRtxEngine, "load_library", classmethod(lambda _cls: trt))
    return cuda


@pytest.fixture
def whole_tensorrt(gpu, monkeypatch):
    """The simulated TensorRT without what only TensorRT-RTX has."""
    trt = simulated_tensorrt(gpu, rtx=False)
    monkeypatch.setattr(TensorRtEngine, "load_library", classmethod(lambda _cls: trt))
    return trt


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "simulated.plan"
    path.write_bytes(simulated_plan())
    return path


def inputs(batch, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(batch, 4)).astype(np.float32), "gain": rng.normal(size=(batch, 1)).astype(np.float32)}


def check(engine, batch, seed):
    given = inputs(batch, seed)
    np.testing.assert_array_equal(engine.run(given)["y"], given["x"] * given["gain"] + np.float32(1))


def test_a_plan_says_what_it_takes_and_where_it_runs(gpu, plan):
    engine = TensorRtRtxEngine(plan, EngineOptions())
    assert [(spec.name, spec.dtype, spec.shape) for spec in engine.inputs] == [
        ("x", "float32", ("batch", 4)),
        ("gain", "float32", ("batch", 1)),
    ]
    assert [(spec.name, spec.shape) for spec in engine.outputs] == [("y", ("batch", 4))]
    assert engine.max_batch == 4
    assert engine.provider == "TensorRT-RTX 1.7.1.116 on RTX 3090"


@pytest.mark.parametrize("replay", [True, False])
def test_every_run_sees_its_own_inputs(gpu, plan, replay):
    engine = TensorRtRtxEngine(plan, EngineOptions(cuda_graph=replay))
    for seed in range(6):
        check(engine, 2, seed)
    assert (gpu.captures, gpu.launches) == ((1, 5) if replay else (0, 0))


def test_results_are_not_changed_by_later_runs(gpu, plan):
    engine = TensorRtRtxEngine(plan, EngineOptions())
    first = engine.run(inputs(2, 0))["y"]
    kept = first.copy()
    engine.run(inputs(2, 1))
    np.testing.assert_array_equal(first, kept)


def test_every_batch_size_has_its_graph(gpu, plan):
    engine = TensorRtRtxEngine(plan, EngineOptions())
    for seed, batch in enumerate([1, 3, 1, 3, 4, 1, 3, 4, 1]):
        check(engine, batch, seed)
    assert gpu.captures == gpu.trt.contexts == 3


def test_batches_above_the_largest_are_cut(gpu, plan):
    engine = TensorRtRtxEngine(plan, EngineOptions())
    for seed in range(3):
        check(engine, 11, seed)


def test_threads_run_at_once_and_get_their_own_results(gpu, plan):
    engine = TensorRtRtxEngine(plan, EngineOptions())
    barrier, failures = threading.Barrier(6), []

    def work(number):
        try:
            for turn in range(15):
                barrier.wait(20)
                check(engine, 1 + (number + turn) % 4, 100 * number + turn)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert 2 <= len(gpu.streams) <= 6  # a lane per caller at a time, not per call
    engine.close()
    assert not gpu.held()


def test_close_frees_everything_and_ends_runs(gpu, plan):
    engine = TensorRtRtxEngine(plan, EngineOptions())
    for seed in range(3):
        check(engine, 2, seed)
    assert gpu.device
    assert gpu.graphs
    engine.close()
    engine.close()
    assert not gpu.held()
    with pytest.raises(EngineError, match="was closed"):
        engine.run(inputs(1))


def test_a_dropped_engine_frees_everything(gpu, plan):
    engine = TensorRtRtxEngine(plan, EngineOptions())
    check(engine, 2, 0)
    del engine
    assert not gpu.held()


def test_a_failed_capture_says_what_to_switch_off(gpu, plan):
    engine = TensorRtRtxEngine(plan, EngineOptions())
    check(engine, 2, 0)
    gpu.uncapturable = True
    with pytest.raises(EngineError, match=r"cudaErrorStreamCaptureUnsupported.*run with cuda_graph=False"):
        engine.run(inputs(2))
    assert not gpu.streams  # the lane is not used again
    check(TensorRtRtxEngine(plan, EngineOptions(cuda_graph=False)), 2, 1)


def test_a_full_gpu_names_the_bytes(gpu, plan):
    gpu.capacity = 4096 + 50  # room for the scratch memory, not for x: 4 rows of 4 floats
    engine = TensorRtRtxEngine(plan, EngineOptions())
    with pytest.raises(EngineError, match=r"no room for 64 bytes of tensor 'x' \(50 of 4,146 are free\)"):
        engine.run(inputs(1))
    assert not gpu.held()
    gpu.capacity = 2**20
    check(engine, 1, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (simulated_plan()[:-5], r"cannot load the plan .*header.size == blobSize failed\.; compile it again"),
        (simulated_plan(header=b"SIMPLAN0"), "compiled by another version of the library; compile it again"),
        (simulated_plan(header=b"JUNKJUNK"), "truncated, or no plan at all; compile it again"),
        (b"", "truncated, or no plan at all"),
        (b"SIM", "truncated, or no plan at all"),
        (None, "cannot read the plan .*No such file"),
    ],
)
def test_a_broken_plan_is_an_error(gpu, tmp_path, content, message):
    path = tmp_path / "broken.plan"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineError, match=message):
        TensorRtRtxEngine(path, EngineOptions())


def test_a_gpu_that_the_header_does_not_name_is_left_to_the_library(gpu, tmp_path):
    """TensorRT-RTX is known to answer "unsupported compute capability" for plans that it then runs."""
    path = tmp_path / "other.plan"
    path.write_bytes(simulated_plan(header=b"SIMPLAN2"))
    check(TensorRtRtxEngine(path, EngineOptions()), 2, 0)


def test_tensorrt_runs_with_what_it_has(whole_tensorrt, plan):
    engine = TensorRtEngine(plan, EngineOptions())
    for seed, batch in enumerate([2, 2, 9, 2]):
        check(engine, batch, seed)
    assert engine.provider == "TensorRT 1.7.1.116 on RTX 3090"
    plan.write_bytes(simulated_plan()[:-5])
    with pytest.raises(EngineError, match=r"TensorRT 1.7.1.116 cannot load the plan .*blobSize failed\.; compile it again"):
        TensorRtEngine(plan, EngineOptions())


def test_the_simulation_has_no_calls_of_its_own():
    """Whatever the engine calls in the simulation is there in the real libraries under the same name."""
    import cuda.bindings.runtime as real_cuda
    import tensorrt_rtx as real

    assert not [name for name in vars(SimulatedCuda) if name.startswith("cuda") and not hasattr(real_cuda, name)]
    pairs = ((SimulatedRtxRuntime, real.Runtime), (SimulatedEngine, real.ICudaEngine), (SimulatedContext, real.IExecutionContext))
    own = {"tensors"}
    for simulated, genuine in pairs:
        assert not [name for name in vars(simulated) if not name.startswith("_") and name not in own and not hasattr(genuine, name)]
    assert not [name for name in vars(simulated_tensorrt(None)) if name not in ("contexts", "__builtins__") and not hasattr(real, name)]


@pytest.mark.skipif(bool(this_machine().gpus), reason="for machines without a GPU")
def test_cuda_without_a_driver_is_an_error():
    cuda = cuda_module.Cuda()
    with pytest.raises(EngineError, match=r"gave no 10 bytes of scratch \(cudaErrorInsufficientDriver\)"):
        cuda.memory(10, "scratch")
    with pytest.raises(EngineError, match="cudaStreamCreateWithFlags failed with cudaErrorInsufficientDriver"):
        cuda.stream()


@pytest.mark.skipif(not this_machine().gpus, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("replay", [True, False])
def test_a_real_plan_on_a_real_gpu(graph, tmp_path, replay):
    TensorRtRtxEngine.compile(graph, tmp_path / "a.plan", replace(SETTINGS, compute_capabilities=()), quiet)
    engine = open_engine("tensorrt-rtx", tmp_path / "a.plan", EngineOptions(cuda_graph=replay))
    reference = open_engine("onnxruntime", graph)
    for seed, batch in enumerate([2, 2, 2, 4, 4, 2, 9]):
        x = np.random.default_rng(seed).normal(size=(batch, 4, 8)).astype(np.float32)
        np.testing.assert_allclose(engine.run({"x": x})["y"], reference.run({"x": x})["y"], rtol=1e-4, atol=1e-5)
