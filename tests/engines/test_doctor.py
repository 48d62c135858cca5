import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from clapsep.engines import KINDS, EngineUnavailable, Machine, doctor, engine_class, this_machine, trial
from clapsep.engines.machine import Gpu
from onnx import helper, numpy_helper

NOWHERE = Machine("linux", "x86_64", None, "there is no NVIDIA driver")
without_gpu = pytest.mark.skipif(bool(this_machine().gpus), reason="there is a GPU here")
without_tensorrt = pytest.mark.skipif("tensorrt" in doctor.installed_packages(), reason="TensorRT is installed here")


def module(folder: Path, name: str, code: str) -> None:
    """A package that takes the place of an installed one once `folder` is on PYTHONPATH."""
    file = folder.joinpath(*name.split("."), "__init__.py")
    file.parent.mkdir(parents=True)
    file.write_text(code)


def distribution(folder: Path, name: str, version: str) -> None:
    """What pip leaves in site-packages for importlib.metadata to see."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def examined(run, tmp_path):
    """The report of the real command, with tmp_path in front of site-packages; `code` is its exit status."""

    def call(*kinds: str, code: int = 0) -> dict:
        words = [word for kind in kinds for word in ("--engine", kind)]
        done = run("clapsep-export", "doctor", "--json", *words, code=code, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        return json.loads(done.stdout)

    return call


@pytest.fixture(scope="module")
def report(run) -> dict:
    return json.loads(run("clapsep-export", "doctor", "--json").stdout)


def only(report: dict) -> dict:
    (engine,) = report["engines"]
    return engine


def test_the_graph_is_what_onnx_makes_of_it():
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["c", "matrix"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 1, 4, 4])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 2, 4, 4])]
    weights = [numpy_helper.from_array(trial.KERNEL, "kernel"), numpy_helper.from_array(trial.MATRIX, "matrix")]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(onnx.load_from_string(trial.GRAPH), full_check=True)
    assert model.SerializeToString(deterministic=True) == trial.GRAPH


def test_the_report_is_complete(report):
    assert set(report) == {"machine", "engines", "findings"}
    machine = report["machine"]
    assert (machine["os"], machine["architecture"]) == (this_machine().os, this_machine().architecture)
    assert (machine["cuda"], machine["trouble"]) == (this_machine().cuda, this_machine().trouble)
    assert machine["distributions"]["numpy"] == np.__version__
    assert machine["python"] == ".".join(map(str, sys.version_info[:3]))
    assert list(dict.fromkeys(engine["kind"] for engine in report["engines"])) == list(KINDS)
    fields = {"kind", "device", "status", "version", "cuda", "provider", "reason", "message", "repair", "distributions"}
    for engine in report["engines"]:
        assert set(engine) == fields
        assert engine["provider" if engine["status"] == "ok" else "message"]


@pytest.mark.parametrize(("kind", "provider"), [("onnxruntime", "CPUExecutionProvider"), ("openvino", "CPU f32")])
def test_engines_on_the_cpu_run_and_say_where(report, kind, provider):
    engine = next(e for e in report["engines"] if (e["kind"], e["device"]) == (kind, "cpu"))
    assert (engine["status"], engine["provider"]) == ("ok", provider)
    assert any(version.startswith(engine["version"]) for version in engine["distributions"].values())


@without_gpu
def test_tensorrt_rtx_compiles_where_it_cannot_run(report):
    engine = next(e for e in report["engines"] if e["kind"] == "tensorrt-rtx")
    assert (engine["status"], engine["reason"]) == ("compile only", "no-driver")
    assert "SM 8.9" in engine["message"]


def test_the_table_has_one_aligned_line_for_each_engine_and_device(run):
    done = run("clapsep-export", "doctor", "--engine", "onnxruntime", "--engine", "openvino")
    head, *lines = done.stdout.split("\n\n")[1].splitlines()
    column = head.index("status")
    found = {tuple(line[:column].split()): re.split("  +", line[column:])[0] for line in lines}
    assert found[("onnxruntime", "cpu")] == found[("openvino", "cpu")] == "ok"
    assert lines[0].endswith("CPUExecutionProvider")


@without_tensorrt
def test_a_requested_kind_that_is_not_installed_fails_with_the_line_that_installs_it(run):
    done = run("clapsep-export", "doctor", "--engine", "tensorrt", "--engine", "onnxruntime", code=1)
    assert re.search(r"tensorrt +cuda +not installed .*run: pip install 'clapsep-export\[tensorrt\]'", done.stdout)


@without_gpu
def test_compiling_is_not_running(examined):
    assert only(examined("tensorrt-rtx", code=1))["status"] == "compile only"


def test_both_onnxruntime_packages_are_found(examined, tmp_path):
    distribution(tmp_path, "onnxruntime_gpu", "1.31.1")
    distribution(tmp_path, "onnxruntime_extensions", "0.14")  # this one may stand beside them
    (finding,) = examined("onnxruntime")["findings"]
    assert (finding["kind"], finding["code"]) == ("onnxruntime", "both-wheels")
    assert finding["repair"].startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime")


def test_the_repair_of_both_wheels_follows_the_machine():
    packages = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1", "cuda-bindings": "13"}
    on_gpu = Machine("linux", "x86_64", "13.0", "", (Gpu("H200", "9.0", 2**37),))
    repairs = [doctor.find(packages, machine, None)[0].repair for machine in (NOWHERE, on_gpu)]
    assert [repair.split()[-1] for repair in repairs] == ["onnxruntime", "onnxruntime-gpu"]


def test_the_tensorrt_that_onnxruntime_cannot_load_is_found(examined, tmp_path):
    distribution(tmp_path, "tensorrt", "11.4.0.2")
    module(tmp_path, "onnxruntime", "")
    (tmp_path / "onnxruntime/capi").mkdir()
    (tmp_path / "onnxruntime/capi/libonnxruntime_providers_tensorrt.so").write_bytes(b"\x7fELF\0libcublas.so.13\0libnvinfer.so.10\0")
    (finding,) = examined("tensorrt", code=1)["findings"]
    assert finding["code"] == "tensorrt-clash"
    assert "tensorrt 11.4.0.2" in finding["message"]
    assert "libnvinfer.so.10" in finding["message"]
    assert finding["repair"] == "pip install 'tensorrt==10.*'"


@pytest.mark.parametrize(
    "names", [("tensorrt_cu12_libs-10.9.0", "tensorrt_cu12-11.4.0"), ("tensorrt_cu12_libs-11.4.0", "tensorrt_cu13_libs-11.4.0")]
)
def test_tensorrt_packages_of_different_versions_are_found(examined, tmp_path, names):
    for name in names:
        distribution(tmp_path, *name.split("-"))
    (finding,) = examined("tensorrt", code=1)["findings"]
    assert finding["code"] == "tensorrt-mixed"
    assert (
        finding["repair"]
        == f"pip uninstall -y {' '.join(sorted(n.split('-')[0].replace('_', '-') for n in names))} && pip install tensorrt"
    )


def test_an_old_numpy_is_found(examined, tmp_path):
    distribution(tmp_path, "numpy", "1.24.0")
    (finding,) = examined("onnxruntime")["findings"]
    assert (finding["code"], finding["repair"]) == ("old-numpy", "pip install 'numpy>=2.0'")


@pytest.mark.parametrize("engine", ["onnxruntime-gpu", "tensorrt", "tensorrt-rtx"])
def test_a_gpu_engine_without_cuda_python_is_found(engine):
    (finding,) = doctor.find({engine: "1.0", "numpy": "2.0"}, NOWHERE, None)
    assert (finding.code, finding.repair) == ("no-cuda-python", "pip install 'cuda-python>=12.6'")
    assert not doctor.find({engine: "1.0", "cuda-bindings": "13.0", "numpy": "2.0"}, NOWHERE, None)


def test_a_healthy_set_of_packages_has_no_findings():
    names = ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-libs", "tensorrt-cu13-bindings")
    packages = dict.fromkeys(names, "10.13.0") | {"onnxruntime-gpu": "1.31", "cuda-python": "13.0", "numpy": "2.4.6"}
    assert not doctor.find(packages, NOWHERE, "10")


SEGFAULT = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"


def test_a_library_that_crashes_is_a_line(run, tmp_path):
    module(tmp_path, "openvino", SEGFAULT)
    done = run("clapsep-export", "doctor", "--engine", "openvino", code=1, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert re.search(r"openvino +cpu +broken +engine openvino crashed with SIGSEGV", done.stdout)


@pytest.mark.parametrize(
    ("code", "reason", "message"),
    [
        ("import ctypes\nctypes.CDLL('libnowhere.so.7')", "not-loadable", "libnowhere.so.7: cannot open shared object file"),
        ("import no_such_package", "not-loadable", "no_such_package is missing; run: pip install 'clapsep-export[openvino]'"),
        ("raise AttributeError('numpy has no bool8')", "", "AttributeError: numpy has no bool8"),
        ("import os\nos._exit(0)", "", "ended with exit status 0"),
        ("import sys\nsys.exit('no licence')", "", "ended with exit status 1: no licence"),
        ("", "", "AttributeError"),
    ],
)
def test_a_library_that_does_not_load_is_broken_and_says_why(examined, tmp_path, code, reason, message):
    module(tmp_path, "openvino", code)
    engine = only(examined("openvino", code=1))
    assert (engine["status"], engine["reason"]) == ("broken", reason)
    assert message in engine["message"]
    assert "doctor" not in engine["message"]
    assert engine["repair"] == (message.partition("run: ")[2])


def test_a_library_that_hangs_is_given_up(tmp_path, monkeypatch):
    module(tmp_path, "openvino", "import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (found,) = doctor.examine(("openvino",), timeout=2).trials
    assert (found.status, found.message) == ("broken", "engine openvino did not end within 2 s")


def test_a_driver_that_crashes_does_not_end_the_doctor(examined, tmp_path):
    module(tmp_path, "cuda.bindings.driver", SEGFAULT)
    (tmp_path / "cuda/__init__.py").touch()
    (tmp_path / "cuda/bindings/__init__.py").touch()
    report = examined("onnxruntime", code=1)
    assert report["machine"]["trouble"] == "looking for the NVIDIA driver crashed with SIGSEGV"
    assert only(report)["status"] == "broken"  # every engine looks for the driver first


def test_nothing_that_runs_is_a_failure_without_being_asked(examined, tmp_path):
    for name in ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"):
        module(tmp_path, name, "raise ImportError('broken on purpose')")
    report = examined(code=1)
    assert [(e["kind"], e["status"]) for e in report["engines"]] == [(kind, "broken") for kind in KINDS]


def test_neither_torch_nor_onnx_is_needed(examined, tmp_path):
    for name in ("torch", "onnx"):
        module(tmp_path, name, "raise RuntimeError('imported')")
    statuses = {engine["kind"]: engine["status"] for engine in examined()["engines"]}
    assert statuses["onnxruntime"] == statuses["openvino"] == "ok"
    assert statuses["tensorrt-rtx"] in ("ok", "compile only")


def test_wrong_results_are_not_ok(monkeypatch):
    monkeypatch.setattr(trial, "expected", lambda x: np.full((len(x), 2, 4, 4), 0.25))
    found = trial.try_engine("onnxruntime", "cpu")
    assert found is not None
    assert found.status == "broken"
    assert "CPUExecutionProvider with wrong results" in found.message


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")
def test_a_build_without_cuda_has_no_line_for_it(report):
    assert [e["device"] for e in report["engines"] if e["kind"] == "onnxruntime"] == ["cpu"]


@without_gpu
def test_what_cuda_lacks_besides_the_driver_is_named(monkeypatch):
    """As on a machine without a GPU where an image for another is made."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    found = trial.try_engine("onnxruntime", "cuda")
    assert found is not None
    assert (found.status, found.reason) == ("broken", "no-driver")
    assert re.search(r"lib\S+: cannot open shared object file", found.message)
    assert found.repair == "pip install 'onnxruntime-gpu[cuda,cudnn]'"


@without_gpu
def test_a_compiler_that_is_missing_is_not_a_missing_engine(monkeypatch):
    def compile_(*_):
        raise EngineUnavailable("compiling needs polygraphy; run: pip install polygraphy", "not-installed")

    monkeypatch.setattr(engine_class("tensorrt-rtx"), "compile", compile_)
    found = trial.try_engine("tensorrt-rtx", "cuda")
    assert found is not None
    assert (found.status, found.reason, found.repair) == ("broken", "no-driver", "pip install polygraphy")
    assert found.message.endswith("nor does it compile: compiling needs polygraphy; run: pip install polygraphy")
